"""CASAS's multi-resident set (adlmr, Kyoto): two people in an apartment follow a script of tasks, alone and together. P01.txt to P26.txt.

    2008-11-10<TAB>14:28:17.986759<TAB>M22<TAB>ON 2 2           date, time, sensor, value, then a resident and a task, or two such pairs

A file is a recording and a group. An event with two pairs belongs to both residents: it has both labels, or the one if they are equal.

Names of tasks: the readme numbers its fifteen tasks otherwise than the recordings do. By the readme 8 is setting out ingredients in the
kitchen and 12 gathering food there, but nearly no event of 8 comes from the kitchen, and those of 12 come from the couch. The names below
are the readme's, put where the sensors and the order of the script have them: the two shared tasks (moving furniture, checkers) have a
number per resident (3 and 4, 8 and 9), those between come one or two numbers later, and the four of the picnic have two (14 and 15).

Source: G. Singla, D. Cook, M. Schmitter-Edgecombe, "Recognizing independent and joint activities among multiple residents in smart
environments", J. Ambient Intelligence and Humanized Computing, 2010.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers.casas_homes import name_sensor, places, read_state
from harkd.homes.readers.common import RULES, clock, recording, rooms, text_lines

TASKS = {  # number: residents who do it, name, description
    "1": ("1", "fill medication dispenser", "in the kitchen, with items from the cabinet"),
    "2": ("2", "hang up clothes", "carries clothes from the couch to the closet in the hall"),
    "3": ("2", "move furniture", "moves couch and coffee table to the other side of the living room, and asks for help"),
    "4": ("1", "help to move furniture", "is the one who was asked to help with couch and coffee table"),
    "5": ("2", "read magazine early", "sits on the couch with a magazine, soon after the furniture was moved"),
    "6": ("1", "water plants", "all around the home, with the watering can from the closet in the hall"),
    "7": ("2", "sweep kitchen floor", "with broom and dust pan from the kitchen closet"),
    "8": ("2", "play checkers, opponent", "plays against the one who fetched the game"),
    "9": ("1", "play checkers", "fetches the game from the closet and plays at the table"),
    "10": ("1", "set out ingredients", "gets things for dinner out of the kitchen cabinets"),
    "11": ("2", "set dining table", "carries dishes from the kitchen to the table"),
    "12": ("1", "read magazine late", "sits on the couch with a magazine, after dinner was prepared"),
    "13": ("12", "pay electric bill", "gets check and pen from under the television, looks up a number, with the other's help"),
    "14": ("1", "pack picnic food", "gathers food in the kitchen and packs it into the basket"),
    "15": ("2", "pack picnic supplies", "gets dishes and supplies, packs them and carries the basket to the front door"),
}
SENSORS = [f"M{n:02d}" for n in (*range(1, 27), 51)] + ["D07", *(f"D{n:02d}" for n in range(9, 16)), "I04", "I06"]


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The one home, and a recording per file. Nothing is read before its events are asked for."""
    paths = sorted(path for path in folder.glob("P*.txt") if re.fullmatch("P[0-9]+", path.stem))
    if not paths:
        raise UserError(f"{folder} holds no P01.txt, P02.txt and so on")
    script = "The activities follow a script: they come in about the order in which they are listed."
    labels = tuple(Label(name, description) for _, name, description in TASKS.values())
    home = Home("adlmr", rooms(_name(sensor, places("kyoto")) for sensor in SENSORS), labels, (*RULES[:-1], script, RULES[-1]))
    return (home,), tuple(recording(path.stem, home, path.stem, ("1", "2"), partial(_events, path)) for path in paths)


def _name(sensor: str, layout: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """(room, name); the layout writes the ids with three digits."""
    return name_sensor(sensor, *layout.get(f"{sensor[:1]}0{sensor[1:]}", ("", "")))


def _events(path: Path, notes: Notes) -> Iterator[Event]:
    number, layout = 0, places("kyoto")
    for _, line, text in text_lines(path):
        words = text.split()
        if not words:
            continue
        time = clock(f"{words[0]} {words[1]}") if len(words) > 3 else None
        state = read_state(words[2], words[3]) if time else None
        if time is None or state is None:
            raise UserError(f"{path}, line {line}: not a date, a time, a sensor and its value: {text.strip()!r}")
        notes.repaired["value with a slip of the log"] += state != words[3]
        notes.noticed["event of a sensor outside the layout"] += words[2] not in SENSORS
        pairs = _pairs(words[4:], notes, path, line)
        notes.unscored["line without a task"] += not pairs
        room, name = _name(words[2], layout)
        labels = tuple(dict.fromkeys(TASKS[task][1] for _, task in pairs))
        yield Event(number, time, name, room, state, labels, ", ".join(sorted({resident for resident, _ in pairs})))
        number += 1


def _pairs(words: list[str], notes: Notes, path: Path, line: int) -> list[tuple[str, str]]:
    """The pairs of resident and task at the end of a line."""
    if len(words) == 1 and re.fullmatch("[12][0-9]{1,2}", words[0]):
        notes.repaired["resident and task run together"] += 1
        words = [words[0][0], words[0][1:]]
    pairs = list(zip(words[::2], words[1::2]))
    if len(words) % 2 or any(resident not in ("1", "2") or task not in TASKS for resident, task in pairs):
        raise UserError(f"{path}, line {line}: residents (1 or 2) and tasks (1 to 15) come in pairs, not {' '.join(words)!r}")
    once = list(dict.fromkeys(pairs))
    notes.repaired["pair of resident and task given twice"] += len(pairs) - len(once)
    notes.noticed["event with two tasks of one resident"] += len(once) > len({resident for resident, _ in once})
    notes.noticed["task that its resident does nowhere else"] += sum(resident not in TASKS[task][0] for resident, task in once)
    return once
