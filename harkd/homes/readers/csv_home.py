"""Your own home: a folder with events.csv and home.json.

events.csv, in the order of time, columns in any order:

    time        2024-05-01 07:22:45, local clock, decimals allowed
    sensor      what it is called in the prompt: fridge
    room        where it is: kitchen (may be empty)
    state       what it reports: opened
    label       optional: the true activity, several parted by ";", empty where unknown
    resident    optional: who caused the event
    recording   optional: the name of an uninterrupted stretch; the rows of one stand together. Without it each day is a recording.

home.json:

    {"name": "home",
     "rooms": {"kitchen": ["fridge (opened, closed)", "stove (turned ON, turned OFF)"], "hall": ["front door (opened, closed)"]},
     "labels": {"COOKING": "prepares a warm meal", "EATING": ""},
     "rules": ["The stove is used for cooking only."]}

`rules` may be left out. A label of events.csv that home.json does not offer leaves its event unscored, and is counted. Recordings that
share a day form a group. The file is indexed once and streamed from where a recording begins; a row is one line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers.common import RULES, clock, read_json, recording, text_lines
from harkd.homes.splits import join_groups

NEEDED, OPTIONAL = ("time", "sensor", "room", "state"), ("label", "resident", "recording")
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can tell a half of a pair, and UTF-8 cannot

Row = tuple[int, int, datetime, dict[str, str]]  # byte offset, line, time, cells by column


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The home, and its recordings. Reads events.csv once."""
    home, path = read_home(folder / "home.json"), folder / "events.csv"
    header = _header(path)
    starts: dict[str, tuple[int, int]] = {}
    days: dict[str, set[date]] = {}
    people: dict[str, set[str]] = {}
    current = None
    for offset, line, time, cells in _rows(path, header):
        id = _recording_of(time, cells)
        if id != current and id in starts:
            raise UserError(f"{path}, line {line}: the rows of recording {id!r} do not stand together: sort the file by time")
        current = id
        starts.setdefault(id, (offset, line))
        days.setdefault(id, set()).add(time.date())
        people.setdefault(id, set()).update({cells.get("resident", "")} - {""})
    groups = join_groups(days)
    streams = {id: partial(_events, path, header, start, id, frozenset(home.label_names)) for id, start in starts.items()}
    return (home,), tuple(recording(id, home, groups[id], sorted(people[id]), streams[id]) for id in starts)


def read_home(path: Path) -> Home:
    """The home that a home.json describes."""
    told = read_json(path, dict)

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    name, described, labels, rules = (told.get(key) for key in ("name", "rooms", "labels", "rules"))
    faults = (
        (not isinstance(name, str) or not name.strip(), '"name" is a text'),
        (not isinstance(described, dict) or not all(map(texts, described.values())), '"rooms" maps each room to a list of its sensors'),
        (not isinstance(labels, dict) or not labels or not texts([*labels.values()]), '"labels" maps each activity to its description'),
        (rules is not None and not texts(rules), '"rules" is a list of sentences'),
        (SURROGATE.search(json.dumps(told, ensure_ascii=False)), "a text holds half of a surrogate pair, which is no character"),
    )
    for fault, rule in faults:
        if fault:
            raise UserError(f"{path}, line 1: {rule}")
    if len({normalize("NFC", label) for label in labels}) < len(labels):  # which is all that a tokenizer tells apart
        raise UserError(f"{path}, line 1: two activities are spelt with the same characters")
    rooms = tuple((room, tuple(sensors)) for room, sensors in described.items())
    offered = tuple(Label(label, description) for label, description in labels.items())
    return Home(name, rooms, offered, (*RULES[:-1], *(rules or ()), RULES[-1]))


def _header(path: Path) -> list[str]:
    """The columns of events.csv."""
    header = next((_cells(path, line, text) for _, line, text in text_lines(path)), [])
    if not {*NEEDED} <= {*header} <= {*NEEDED, *OPTIONAL} or len({*header}) < len(header):
        told = f"columns are {', '.join(NEEDED)} and, optional, {', '.join(OPTIONAL)}"
        raise UserError(f"{path}, line 1: {told}, each once, not {', '.join(header) or 'none'}")
    return header


def _cells(path: Path, line: int, text: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([text], strict=True), [])]
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}") from None


def _rows(path: Path, header: list[str], offset: int = 0, line: int = 1) -> Iterator[Row]:
    """The rows from `offset` on; lines without text are passed over."""
    for offset, line, text in text_lines(path, offset, line):
        if line > 1 and text.strip():
            cells = dict(zip(header, row := _cells(path, line, text)))
            if len(row) != len(header):
                raise UserError(f"{path}, line {line}: {len(row)} cells where the first line names {len(header)}")
            if (time := clock(cells["time"])) is None:
                raise UserError(f"{path}, line {line}: {cells['time']!r} is not a time YYYY-MM-DD HH:MM:SS")
            yield offset, line, time, cells


def _recording_of(time: datetime, cells: dict[str, str]) -> str:
    return cells.get("recording") or f"{time.date()}"


def _events(path: Path, header: list[str], start: tuple[int, int], id: str, offered: frozenset[str], notes: Notes) -> Iterator[Event]:
    last = None
    for number, (_, _, time, cells) in enumerate(_rows(path, header, *start)):
        if _recording_of(time, cells) != id:
            break
        told = [label.strip() for label in cells.get("label", "").split(";") if label.strip()]
        labels = tuple(dict.fromkeys(label for label in told if label in offered))
        if not labels:
            notes.unscored[f"label {told[0]!r}, which home.json does not offer" if told else "no label"] += 1
        notes.noticed["event before the one above it"] += last is not None and time < last
        yield Event(number, time, cells["sensor"], cells["room"], cells["state"], labels, cells.get("resident", ""))
        last = time
