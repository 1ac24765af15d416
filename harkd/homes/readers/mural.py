"""MuRAL: 21 sessions of two to four people in one apartment, with activities in natural language.

    <session>/data.csv      uid, time (HH:MM:SS, may pass midnight), sensor, action, Subject, Description, activity (a number)
    sensors.json            a list of {"sensor name", "sensor type", "sensor location"}
    activities.json         a list of {"id", "name", "description"}

A session is a recording and a group. Rows without a sensor are remarks, and left out. Labels are spelt as in the data, slips and commas
included. Subject is the resident, several of them parted by commas; Description and context.json (roles, scenario) are not read at all.

data.csv shortens the names of sensors.json ("sink mov" for "sink motion sensor", with or without the room): both are compared without the
words that say what kind of sensor it is. No session has a date: each begins on 1 January 1970.

Source: X. Chen, J. Cumin, F. Ramparany, D. Vaufreydaz, "MuRAL: A Multi-Resident Ambient Sensor Dataset Annotated with Natural Language for
Activities of Daily Living", arXiv 2504.20505.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers.common import RULES, clock, read_json, recording, rooms
from harkd.homes.readers.table import EPOCH, read_rows

COLUMNS = ("time", "sensor", "action", "Subject", "activity")
OWN_RULES = (
    "A chair contact that opens means that somebody sits down, one that closes that somebody stands up.",
    "The toilet contact closes when somebody begins to use the toilet, and opens afterwards.",
    "Labels are spelt as in the list, even where that is not correct English.",
)


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The one home, and a recording per session. Reads who was there."""
    paths = sorted(folder.glob("*/data.csv"))
    if not paths:
        raise UserError(f"{folder} holds no <session>/data.csv: name the folder that holds 01 to 21")
    sensors = _strings(folder / "sensors.json", "sensor name", "sensor location")
    activities = _strings(folder / "activities.json", "id", "name", "description")
    names = _names(sensors)
    labels = tuple(Label(name, " ".join(description.split())) for _, name, description in activities)
    home = Home("mural", rooms(dict.fromkeys(names.values())), labels, (*RULES[:-1], *OWN_RULES, RULES[-1]))
    by_number = {number: name for number, name, _ in activities}
    recordings = []
    for path in paths:
        residents = sorted({person for _, cells in read_rows(path, COLUMNS) for person in _parts(cells[3])})
        stream = partial(_events, path, names, by_number)
        recordings.append(recording(path.parent.name, home, path.parent.name, residents, stream))
    return (home,), tuple(recordings)


def _strings(path: Path, *keys: str) -> list[list[str]]:
    """The values of `keys` for each object of a JSON list."""
    entries = read_json(path, list)
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), (str, int)) for key in keys):
            raise UserError(f"{path}, entry {number} of the list: needs {', '.join(keys)}")
    return [[str(entry[key]) for key in keys] for entry in entries]


def _names(sensors: list[list[str]]) -> dict[str, tuple[str, str]]:
    """Map what data.csv may call a sensor, as `_key` writes it, to its (room, name): with its room, and without where that is unique."""
    alone = Counter(_key(name) for name, _ in sensors)
    names = {}
    for name, room in sensors:
        own = _key(name).removeprefix(f"{_key(room)} ")
        for key in (_key(f"{room} {own}"), *([_key(name)] if alone[_key(name)] == 1 else [])):
            names[key] = (room, own)
    return names


def _key(name: str) -> str:
    """A sensor's name without its kind, `mov` written out."""
    words = re.sub(r"\bmov\b", "motion", name.lower().replace("_", " ")).split()
    return " ".join(word for word in words if word not in ("sensor", "wattmeter", "oven", "pir", "magnetic", "contact"))


def _parts(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(",") if part.strip()]


def _events(path: Path, names: dict[str, tuple[str, str]], activities: dict[str, str], notes: Notes) -> Iterator[Event]:
    number, days, last = 0, timedelta(), None
    for line, (clock_time, sensor, action, subject, activity) in read_rows(path, COLUMNS):
        time = clock(f"{EPOCH:%Y-%m-%d} {clock_time}")
        unknown = [part for part in _parts(activity) if part not in activities]
        if time is None or unknown:
            fault = f"{unknown[0]!r} is no activity of activities.json" if unknown else f"{clock_time!r} is not a time HH:MM:SS"
            raise UserError(f"{path}, line {line}: {fault}")
        if last is not None and time + days < last - timedelta(hours=12):
            days += timedelta(days=1)
        notes.noticed["row before the one above it"] += last is not None and time + days < last
        last = time + days
        if not sensor:
            notes.noticed["row without a sensor: left out"] += 1
            continue
        notes.noticed["event of a sensor outside sensors.json"] += _key(sensor) not in names
        notes.noticed["event without an action"] += not action
        notes.unscored["row without an activity"] += not activity
        room, name = names.get(_key(sensor), ("", sensor))
        labels = tuple(dict.fromkeys(activities[part] for part in _parts(activity)))
        yield Event(number, last, name, room, action, labels, ", ".join(_parts(subject)))
        number += 1
