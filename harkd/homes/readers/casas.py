"""CASAS: long recordings of lived-in homes, one file each: `data` (Aruba, Cairo, Milan, Kyoto's twor), *.ann.txt, *.csv.

    2010-11-04 00:03:50.209589 M003 ON Sleeping begin         classic: blanks or tabs; between begin and end the activity goes on
    2012-07-20 10:38:54.5 M001 OutsideDoor Entry ON Control4-Motion Step_Out       annotated columns: one label an event, if any
    2012-07-20,10:38:54.5,KitchenAStove,ON,Cook="begin"       the release of 2025

A file is a home, and each local day of it a recording and a group; where a date comes back later in the file, that stretch is a recording
of its own in the day's group. The file is read once for the index, which holds for each day where it begins and what goes on there; a day
is then streamed from its place, so memory does not grow with the file.

The labels of an event are all activities that go on, those of its own line included: several where people act at once. `R1_Sleep` is the
label `Sleep` of resident R1. A begin without an end (before the next begin of the same) and an end without a begin label their own line
alone. Nothing labels an event outside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers.casas_homes import LAYOUTS, PSEUDO, SLIPS, name_sensor, places, read_state, words
from harkd.homes.readers.common import RULES, clock, recording, rooms, text_lines

_MARK = re.compile(r'(.+?)[ =_]"?(begin|end)"?', re.IGNORECASE)
_RESIDENT = re.compile("(R[0-9]+)[ _]+(.+)")


class Row(NamedTuple):
    offset: int
    line: int
    time: datetime
    sensor: str
    room: str
    place: str
    value: str
    activity: tuple[str, str] | None  # resident or "", label
    mark: str  # begin, end, or "" for a label of this line alone


class Day(NamedTuple):
    date: date
    offset: int
    line: int
    going_on: tuple[tuple[tuple[str, str], int], ...]  # activity, line of its begin


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """One home per file, in the folder and the folders in it. Reads each file once."""
    everything = (path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file())
    paths = sorted(path for path in everything if re.fullmatch(r"data|(?!README).*\.(txt|csv)", path.name))
    if not paths:
        raise UserError(f"{folder} holds no file of CASAS: they are called data, *.txt or *.csv")
    found = [_read_file(path) for path in paths]
    if len({home.name for home, _ in found}) < len(found):
        raise UserError(f"{folder} holds two files of one home: name the folder of one of them")
    return tuple(home for home, _ in found), tuple(one for _, recordings in found for one in recordings)


def _read_file(path: Path) -> tuple[Home, list[Recording]]:
    """Index a file: its days, sensors, activities and the begins that have no end."""
    days: list[Day] = []
    begun: dict[tuple[str, str], int] = {}
    endless: set[int] = set()
    activities: set[tuple[str, str]] = set()
    sensors: dict[str, tuple[str, str]] = {}
    name = path.resolve().parent.name if path.name == "data" else path.name.partition(".")[0]
    layout = places(next((known for known in LAYOUTS if known in name.replace("twor", "kyoto").lower()), ""))
    for row in _rows(path, Notes()):
        if not days or row.time.date() != days[-1].date:
            days.append(Day(row.time.date(), row.offset if days else 0, row.line if days else 1, tuple(begun.items())))
        if row.sensor not in sensors and row.sensor not in PSEUDO:
            sensors[row.sensor] = name_sensor(row.sensor, *((row.room, row.place) if row.room else layout.get(row.sensor, ("", ""))))
        if row.activity:
            activities.add(row.activity)
        if row.activity and row.mark:
            before = begun.pop(row.activity, None)
            if row.mark == "begin":
                endless.update([before] if before else [])
                begun[row.activity] = row.line
    if not days:
        raise UserError(f"{path}, line 1: no line of this file reads `date time sensor value`")
    endless.update(begun.values())
    labels = tuple(Label(label) for label in sorted({label for _, label in activities}))
    home = Home(f"casas-{name}", rooms(sensors[sensor] for sensor in sorted(sensors)), labels, RULES)
    residents = sorted({resident for resident, _ in activities} - {""})
    ends = [day.offset for day in days[1:]] + [path.stat().st_size]
    seen: Counter[date] = Counter()
    recordings = []
    for day, end in zip(days, ends):
        seen[day.date] += 1
        id = f"{day.date}#{seen[day.date]}" if seen[day.date] > 1 else f"{day.date}"
        stream = partial(_events, path, day, end, frozenset(endless), sensors)
        recordings.append(recording(id, home, f"{name}/{day.date}", residents, stream))
    return home, recordings


def _events(path: Path, day: Day, end: int, endless: frozenset[int], sensors: dict[str, tuple[str, str]], notes: Notes) -> Iterator[Event]:
    """The events of a day, which ends before byte `end`."""
    going_on = {activity: None for activity, line in day.going_on if line not in endless}
    number, last = 0, None
    for row in _rows(path, notes, day.offset, day.line):
        if row.offset >= end:
            break
        now = going_on if row.activity is None else {**going_on, row.activity: None}
        if row.mark == "begin" and row.line not in endless:
            going_on = now
        elif row.mark == "begin":
            notes.repaired["begin without an end: labels its own line alone"] += 1
        elif row.mark == "end":
            notes.repaired["end without a begin: labels its own line alone"] += row.activity not in going_on
            going_on = {activity: None for activity in going_on if activity != row.activity}
        state = read_state(row.sensor, row.value)
        if row.sensor in PSEUDO or state is None:
            notes.repaired["line of no sensor: left out" if row.sensor in PSEUDO else "value that cannot be read: left out"] += 1
            continue
        notes.repaired["value with a slip of the log"] += state != row.value
        notes.noticed["event before the one above it"] += last is not None and row.time < last
        labels = tuple(dict.fromkeys(label for _, label in now))
        notes.unscored["outside all activities"] += not labels
        room, name = sensors[row.sensor]
        yield Event(number, row.time, name, room, state, labels)
        number, last = number + 1, row.time


def _rows(path: Path, notes: Notes, offset: int = 0, line: int = 1) -> Iterator[Row]:
    """The lines of a file from `offset` on that tell of a sensor at a time."""
    for offset, line, text in text_lines(path, offset, line):
        parts = (text.replace(",", " ") if text[10:11] == "," else text).split()
        time = clock(f"{parts[0]} {parts[1]}") if len(parts) > 3 else None
        if time is None:
            notes.repaired["line without date, time, sensor and value: left out" if parts else "empty line: left out"] += 1
            continue
        sensor, room, place, value, rest = parts[2], "", "", parts[3], parts[4:]
        if rest[2:] and rest[2].startswith("Control4"):
            room, place, value, rest = words(value), words(rest[0]), rest[1], rest[3:]
        if sensor in SLIPS:
            notes.repaired["sensor with a slip of the log"] += 1
            sensor = SLIPS[sensor]
        activity, mark = _activity(" ".join(rest)) if rest else (None, "")
        yield Row(offset, line, time, sensor, room, place, value, activity, mark)


def _activity(text: str) -> tuple[tuple[str, str] | None, str]:
    """((resident, label), mark) of an annotation."""
    match = _MARK.fullmatch(text)
    label, mark = (match[1], match[2].lower()) if match else (text, "")
    owner = _RESIDENT.fullmatch(label)
    return ((owner[1], owner[2]) if owner else ("", label)), mark
