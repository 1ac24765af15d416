"""UCI ADL with binary sensors (Ordonez): one person each in two homes, A and B. OrdonezA_Sensors.txt, OrdonezA_ADLs.txt, and so for B.

    2011-11-28 02:27:59<TAB><TAB>2011-11-28 10:18:11<TAB>Bed<TAB><TAB>Pressure<TAB>Bedroom          start, end, location, type, place
    2011-11-28 02:27:59<TAB><TAB>2011-11-28 10:18:11<TAB>Sleeping                                   start, end, activity

below two lines of head. Fields are parted by any blanks and hold none. The start of a sensor's interval is one event, its end another.
A local day is a recording and a group. `Door` is named by its place, being one in each of several rooms.

One person does one thing: the label of an event is that of the last interval to start among those that hold its time, both ends included.
A label that ends before it starts (in A three do, by slips of the day, the hour or both) ends where the label below it starts. A sensor's
interval that ends before it starts has its ends swapped.

Source: F. J. Ordonez, P. de Toledo, A. Sanchis, "Activity Recognition Using Hybrid Generative/Discriminative Models on Home Environments
Using Binary Sensors", Sensors 13, 2013.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers.common import RULES, clock, recording, rooms, text_lines

STATES = {  # by type: at the start and at the end
    "PIR": ("motion ON", "motion OFF"),
    "Magnetic": ("opened", "closed"),
    "Pressure": ("occupied", "released"),
    "Electric": ("turned ON", "turned OFF"),
    "Flush": ("flush started", "flush ended"),
}
ACTIVITIES = {
    "Leaving": "is out of the home",
    "Toileting": "uses the toilet",
    "Showering": "takes a shower",
    "Sleeping": "sleeps in bed",
    "Breakfast": "prepares or has breakfast",
    "Lunch": "prepares or has lunch",
    "Dinner": "prepares or has dinner",
    "Snack": "has something small between meals",
    "Spare_Time/TV": "rests on the seat or watches television",
    "Grooming": "washes, brushes teeth, shaves or combs at the basin",
}


class Interval(NamedTuple):
    start: datetime
    end: datetime
    fields: tuple[str, ...]  # location, type, place; or the activity


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """A home for each letter whose sensors are there, and one recording per day. Reads the sensors, to learn the days and rooms."""
    homes, recordings = [], []
    for path in sorted(folder.glob("Ordonez?_Sensors.txt")):
        letter = path.name[7]
        sensors = _intervals(path, 3, Notes())
        named = sorted({(*_name(it.fields), STATES.get(it.fields[1], ("ON", "OFF"))) for it in sensors})
        labels = tuple(Label(name, description) for name, description in ACTIVITIES.items())
        homes.append(Home(f"ordonez-{letter}", rooms((room, f"{name} ({on}, {off})") for room, name, (on, off) in named), labels, RULES))
        days = sorted({time.date() for it in sensors for time in (it.start, it.end)})
        for day in days:
            id = f"{letter}/{day}"
            recordings.append(recording(id, homes[-1], id, (letter,), partial(_events, path, letter, day, day == days[0])))
    if not homes:
        raise UserError(f"{folder} holds no OrdonezA_Sensors.txt or OrdonezB_Sensors.txt")
    return tuple(homes), tuple(recordings)


def _name(fields: tuple[str, ...]) -> tuple[str, str]:
    """(room, sensor) in English: a motion sensor watches a doorway, not the door."""
    location, kind, place = fields
    name = {"Maindoor": "main door", "Door": "doorway" if kind == "PIR" else "door"}.get(location, location.lower())
    return place.lower(), name


def _events(path: Path, resident: str, day: date, first: bool, notes: Notes) -> Iterator[Event]:
    """The day's events. What is odd about the tables is counted with the first day."""
    of_tables = notes if first else Notes()
    events = []
    for it in _intervals(path, 3, of_tables):
        room, name = _name(it.fields)
        states = STATES.get(it.fields[1], ("ON", "OFF"))
        events += [Event(0, time, name, room, state) for time, state in zip((it.start, it.end), states) if time.date() == day]
    labels = _intervals(path.with_name(path.name.replace("Sensors", "ADLs")), 1, of_tables)
    for number, event in enumerate(sorted(events, key=lambda event: event.time)):
        holding = [(label.start, row) for row, label in enumerate(labels) if label.start <= event.time <= label.end]
        notes.noticed["event in intervals of several labels"] += len(holding) > 1
        notes.unscored["outside all label intervals"] += not holding
        yield replace(event, id=number, labels=labels[max(holding)[1]].fields if holding else (), resident=resident)


def _intervals(path: Path, fields: int, notes: Notes) -> list[Interval]:
    """The rows of a file with so many fields behind start and end, in its order: 3 for sensors, 1 for labels."""
    rows: list[Interval] = []
    for _, line, text in text_lines(path):
        words = text.split()
        if line <= 2 or not words:
            continue
        start, end = (clock(" ".join(words[at : at + 2])) for at in (0, 2))
        if start is None or end is None or len(words) != 4 + fields or (fields == 1 and words[4] not in ACTIVITIES):
            wanted = "location, type and place" if fields == 3 else f"one of {', '.join(ACTIVITIES)}"
            raise UserError(f"{path}, line {line}: not a start, an end, then {wanted}: {text.strip()!r}")
        rows.append(Interval(start, end, tuple(words[4:])))
    for at, it in enumerate(rows):
        above, below = rows[max(at - 1, 0)], rows[min(at + 1, len(rows) - 1)]
        if fields == 3:
            notes.noticed["sensor interval that starts before the one above it"] += it.start < above.start
            notes.repaired["sensor interval that ends before it starts: ends swapped"] += it.end < it.start
            rows[at] = Interval(min(it.start, it.end), max(it.start, it.end), it.fields)
        else:
            notes.noticed["label that starts before the one above it ends"] += it.start < above.end and at > 0
            notes.repaired["label that ends before it starts: ends with the next"] += it.end < it.start
            rows[at] = it if it.start <= it.end else it._replace(end=max(it.start, below.start))
    return rows
