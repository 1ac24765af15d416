"""ARAS: 30 days each in two homes of two people, House A and House B. DAY_1.txt to DAY_30.txt, plain or in gzip.

One line is one second of the day: 20 binary sensors, then the activity of resident 1 and of resident 2, as numbers with blanks between.

An event is a change of a sensor from one second to the next, read while the day is streamed; the first second of a day changes nothing.
Days have no date: day n is put on the nth of January 1970. A day is a recording and a group. An event's labels are the activities of all
who are at home in its second: Going Out is left aside where the other remains, since who is out moves nothing.

What 1 means is not documented. It is read as opened, occupied, near or running. Rooms are those of the readme's places; chairs and couches
whose room it does not tell have none.

Source: H. Alemdar, H. Ertan, O. D. Incel, C. Ersoy, "ARAS Human Activity Datasets in Multiple Homes with Multiple Residents", 2013.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Notes, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers.common import RULES, recording, rooms, text_lines
from harkd.homes.readers.table import EPOCH

STATES = {"opened": "closed", "occupied": "released", "somebody near": "nobody near", "ON": "OFF"}  # at 1: at 0
SENSORS = {  # by house, in the order of columns: room/name/state at 1
    "A": "bedroom/wardrobe 1/opened, living room/convertible couch/occupied, living room/television remote/ON, "
    "living room/couch place 1/occupied, living room/couch place 2/occupied, /chair 1/occupied, /chair 2/occupied, kitchen/fridge/opened, "
    "kitchen/drawer/opened, bedroom/wardrobe 2/opened, bathroom/cabinet/opened, hall/house door/opened, bathroom/door/opened, "
    "bathroom/shower cabin door/opened, hall/distance sensor/somebody near, kitchen/distance sensor/somebody near, "
    "bathroom/tap/somebody near, bathroom/water closet/somebody near, kitchen/heat sensor/ON, bedroom/bed/occupied",
    "B": "kitchen/cupboard 1/opened, kitchen/cupboard 2/opened, hall/house door/opened, bedroom/wardrobe door 1/opened, "
    "bedroom/wardrobe door 2/opened, bathroom/shower cabin door/opened, bathroom/tap/somebody near, /chair 1/occupied, /chair 2/occupied, "
    "/chair 3/occupied, kitchen/fridge/opened, kitchen/drawer/opened, living room/couch place 1/occupied, "
    "living room/couch place 2/occupied, bedroom/bed 1/occupied, bedroom/bed 2/occupied, living room/armchair/occupied, "
    "bathroom/distance sensor at the door/somebody near, kitchen/distance sensor/somebody near, "
    "/distance sensor at the closet/somebody near",
}
ACTIVITIES = (
    "Other, Going Out, Preparing Breakfast, Having Breakfast, Preparing Lunch, Having Lunch, Preparing Dinner, Having Dinner, "
    "Washing Dishes, Having Snack, Sleeping, Watching TV, Studying, Having Shower, Toileting, Napping, Using Internet, Reading Book, "
    "Laundry, Shaving, Brushing Teeth, Talking on the Phone, Listening to Music, Cleaning, Having Conversation, Having Guest, "
    "Changing Clothes"
).split(", ")
NUMBERED = {f"{number}": name for number, name in enumerate(ACTIVITIES, 1)}
OUT = "Going Out"
SECONDS = 86_400


def read(folder: Path, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The homes whose days lie in folder/House_A and folder/House_B, or in the folder itself if it has such a name."""
    homes, recordings = [], []
    for house, columns in SENSORS.items():
        sensors = [tuple(column.split("/")) for column in columns.split(", ")]
        days: dict[int, Path] = {}
        inside = folder.glob("DAY_*") if re.fullmatch(f"House.?{house}", folder.resolve().name) else ()
        for path in sorted([*folder.glob(f"House*{house}/DAY_*"), *inside]):
            if match := re.fullmatch(r"DAY_([0-9]{1,4})\.txt(\.gz)?", path.name):
                days.setdefault(int(match[1]), path)  # DAY_1.txt before DAY_1.txt.gz
        if days:
            labels = tuple(Label(name, "leaves or comes back while nobody else is at home" if name == OUT else "") for name in ACTIVITIES)
            home = Home(f"aras-{house}", rooms((room, f"{name} ({on}, {STATES[on]})") for room, name, on in sensors), labels, RULES)
            homes.append(home)
            for day, path in sorted(days.items()):
                id = f"House_{house}/DAY_{day}"
                recordings.append(recording(id, home, id, ("1", "2"), partial(_events, path, day, sensors)))
    if not homes:
        raise UserError(f"{folder} holds no House_A/DAY_1.txt or House_B/DAY_1.txt")
    return tuple(homes), tuple(recordings)


def _events(path: Path, day: int, sensors: list, notes: Notes) -> Iterator[Event]:
    """The changes from each line to the next."""
    number, line = 0, 0
    last_text, last = "", ()
    for _, line, text in text_lines(path):
        if text == last_text:  # most seconds: nothing to read
            continue
        cells = text.split()
        if len(cells) != 22 or not {*cells[:20]} <= {"0", "1"}:
            raise UserError(f"{path}, line {line}: not 20 sensors, each 0 or 1, and two activities")
        labels = _labels(cells[20:], path, line)
        for sensor, before, now in zip(sensors, last, cells):
            if before != now:
                room, name, on = sensor
                time = EPOCH + timedelta(days=day - 1, seconds=line - 1)
                yield Event(number, time, name, room, on if now == "1" else STATES[on], labels)
                number += 1
        last_text, last = text, tuple(cells[:20])
    notes.noticed["day that has not one line for each second"] += line != SECONDS


def _labels(numbers: list[str], path: Path, line: int) -> tuple[str, ...]:
    """The activities of the residents, each once, without Going Out where one of them is at home."""
    if not all(number in NUMBERED for number in numbers):
        raise UserError(f"{path}, line {line}: an activity is a number from 1 to {len(ACTIVITIES)}, not {' '.join(numbers)!r}")
    labels = dict.fromkeys(NUMBERED[number] for number in numbers)
    return tuple(label for label in labels if label != OUT or len(labels) == 1)
