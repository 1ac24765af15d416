"""MARBLE: several people act out daily activities in a home with magnetic contacts, smart plugs and pressure mats.

    <scenario>/<instance>/environmental.csv             sensor_id, sensor_status (ON or OFF), ts, subject_id
    <scenario>/<instance>/subject-<id>/labels.csv       ts_start, ts_end, act
    <scenario>/<instance>/subject-<id>/smartphone.csv   event_id, event_status, ts        (may be absent or empty)

Times are UNIX milliseconds. An instance is a recording. Recordings that share a person and a local day form a group.

The label of an event is that of its own subject's interval which holds its time, both ends included. Intervals overlap where the annotators
went back: a real activity then beats TRANSITION, and among several the one that starts last wins (the later row at a tie), being the latest
statement about that moment. In the 20 instances known to us no event lies in two different labels. An interval that ends before it starts
is read with its ends swapped: either way it speaks of that stretch of time, and dropping it would lose the label.

What ON means for a magnetic contact is not documented. It is read as "opened": at the median ON lasts 4 to 7 seconds, the time a drawer or
fridge stands open. Rooms follow locations.csv: the pantry is opened from the kitchen, the medicines cabinet from a medicine area.

Source: L. Arrotta, C. Bettini, G. Civitarese, "The MARBLE Dataset", MobiQuitous 2021.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers import marble_home
from harkd.homes.readers.common import recording
from harkd.homes.readers.table import local_time, milliseconds, read_rows
from harkd.homes.splits import join_groups


class Row(NamedTuple):
    time: int
    sensor: str
    on: bool
    subject: str


class Interval(NamedTuple):
    start: int
    end: int
    label: str


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The one home, and one recording per instance. Reads who was there on which days; labels are read with the events."""
    home = marble_home.home(transition=options.transition == "label", smartphone=options.smartphone)
    instances = [Instance(path, home, options) for path in _instance_folders(folder)]
    if not instances:
        raise UserError(f"{folder} holds no <scenario>/<instance>/environmental.csv: name the folder MARBLE calls `dataset`")
    people: dict[str, tuple[str, ...]] = {}
    keys: dict[str, list[tuple[str, date]]] = {}
    for instance in instances:
        rows = instance.rows(Notes())
        people[instance.id] = tuple(sorted({*instance.subjects, *(row.subject for row in rows)} - {""}))
        keys[instance.id] = list(product(people[instance.id], {local_time(row.time, options.utc_offset).date() for row in rows}))
    groups = join_groups(keys)
    recordings = (recording(it.id, home, groups[it.id], people[it.id], it.events) for it in instances)
    return (home,), tuple(replace(found, scenario=found.id.partition("/")[0]) for found in recordings)


def _instance_folders(folder: Path) -> list[Path]:
    """The folders <scenario>/<instance> that hold part of a recording, instance10 after instance2."""
    found = {path.parent for path in [*folder.glob("*/*/environmental.csv"), *folder.glob("*/*/subject-*")]}
    return sorted(found, key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.as_posix())])


@dataclass(frozen=True)
class Instance:
    """One recording on the disk."""

    folder: Path
    home: Home
    options: ReadOptions

    @property
    def id(self) -> str:
        return "/".join(self.folder.parts[-2:])

    @property
    def subjects(self) -> dict[str, Path]:
        """The subjects' folders by the number that environmental.csv uses."""
        return {path.name.removeprefix("subject-"): path for path in sorted(self.folder.glob("subject-*"))}

    def events(self, notes: Notes) -> Iterator[Event]:
        """Label every row by its own subject's intervals; `notes` counts what was odd."""
        intervals = {subject: read_intervals(path / "labels.csv", notes) for subject, path in self.subjects.items()}
        rows = self.rows(notes)
        _note_switches(rows, notes)
        for number, row in enumerate(rows):
            label, cause = _label(row.time, intervals.get(row.subject), notes)
            labels = (label,) if label in self.home.label_names else ()
            if not labels:
                notes.unscored[cause or label] += 1
            room, sensor, state = marble_home.describe(row.sensor, row.on)
            if row.sensor not in marble_home.SENSORS:
                notes.noticed["event of a sensor that MARBLE does not document"] += 1
            yield Event(number, local_time(row.time, self.options.utc_offset), sensor, room, state, labels, row.subject)

    def rows(self, notes: Notes) -> list[Row]:
        """All events of the instance in the order of time; those of one time stay in the order of their files."""
        rows = list(_read_events(self.folder / "environmental.csv", notes))
        if self.options.smartphone:
            for subject, folder in self.subjects.items():
                rows += _read_events(folder / "smartphone.csv", notes, subject)
        return sorted(rows, key=lambda row: row.time)


def _read_events(path: Path, notes: Notes, phone_of: str | None = None) -> Iterator[Row]:
    """The rows of environmental.csv, or of the smartphone.csv of `phone_of`, which may be absent or empty."""
    if phone_of is not None and not path.is_file():
        return
    columns = ("sensor_id", "sensor_status", "ts", "subject_id") if phone_of is None else ("event_id", "event_status", "ts")
    last = None
    for line, (sensor, status, time, *subject) in read_rows(path, columns, may_be_empty=phone_of is not None):
        if status.upper() not in ("ON", "OFF"):
            raise UserError(f"{path}, line {line}: {columns[1]} is ON or OFF, not {status!r}")
        row = Row(milliseconds(time, path, line), sensor, status.upper() == "ON", subject[0] if subject else str(phone_of))
        if last is not None and row.time < last:
            notes.repaired["event before the one above it: sorted by time"] += 1
        last = row.time
        yield row


def read_intervals(path: Path, notes: Notes) -> list[Interval] | None:
    """A subject's labels in the order of the file, None without a file."""
    if not path.is_file():
        return None
    intervals: list[Interval] = []
    for line, (first, second, label) in read_rows(path, ("ts_start", "ts_end", "act")):
        start, end = milliseconds(first, path, line), milliseconds(second, path, line)
        if label not in marble_home.ACTIVITIES:
            raise UserError(f"{path}, line {line}: unknown activity {label!r}: MARBLE has {', '.join(marble_home.ACTIVITIES)}")
        if end < start:
            notes.repaired["label interval that ends before it starts: ends swapped"] += 1
        interval = Interval(min(start, end), max(start, end), label)
        notes.noticed["label interval of zero length"] += start == end
        notes.noticed["label interval given twice"] += interval in intervals
        notes.noticed["label interval that starts before the one above it ends"] += bool(intervals) and interval.start < intervals[-1].end
        intervals.append(interval)
    return intervals


def _label(time: int, intervals: list[Interval] | None, notes: Notes) -> tuple[str, str]:
    """(label, "") of the subject at that time, or ("", why there is none)."""
    if intervals is None:
        return "", "subject without labels.csv"
    holding = [(interval.start, row, interval.label) for row, interval in enumerate(intervals) if interval.start <= time <= interval.end]
    if not holding:
        return "", "outside its subject's label intervals"
    notes.noticed["event in intervals of different labels"] += len({label for _, _, label in holding}) > 1
    return max([held for held in holding if held[2] != marble_home.TRANSITION] or holding)[2], ""


def _note_switches(rows: list[Row], notes: Notes) -> None:
    """Count what is switched off without having been on, on while it was on, and never off. Each subject's phone is one of its own."""
    on: dict[tuple[str, str], bool] = {}
    for row in rows:
        key = (row.sensor, row.subject if row.sensor in marble_home.PHONES else "")
        notes.noticed["OFF of a sensor that was not ON"] += not row.on and not on.get(key, False)
        notes.noticed["ON of a sensor that was ON already"] += row.on and on.get(key, False)
        on[key] = row.on
    notes.noticed["sensor still ON at the end of its recording"] += sum(on.values())
