"""MARBLE's home: its sensors, activities and their meaning, rules for ambiguous events, and a hand-written example.

The activities paraphrase the data set's own readme. The rules follow from those and from what the sensors cannot see; the example is
invented. Neither was fitted to recordings.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from harkd.homes.events import Event, Home, Label
from harkd.homes.readers.common import rooms

TRANSITION = "TRANSITION"

# by the first letter of the sensor id: kind, state at ON, state at OFF
KINDS = {
    "R": ("magnetic contact", "opened", "closed"),
    "E": ("smart plug", "turned ON", "turned OFF"),
    "P": ("pressure mat", "occupied", "released"),
    "S": ("smartphone", "started", "ended"),
}

_SENSORS = {  # by room: sensor id and name
    "kitchen": "R1 pantry, R2 cutlery drawer, R5 pots drawer, R7 fridge, E1 stove",
    "medicine area": "R6 medicines cabinet",
    "dining room": "P1 chair 1, P4 chair 2, P5 chair 3, P6 chair 4",
    "living room": "E2 television, P3 couch place 1, P7 couch place 2, P8 couch place 3, P9 couch place 4",
    "office": "P2 chair",
    "": "S1 outgoing phone call, S2 incoming phone call",
}
SENSORS = {sensor[:2]: (room, sensor[3:]) for room, sensors in _SENSORS.items() for sensor in sensors.split(", ")}  # id: room, name
PHONES = ("S1", "S2")

ACTIVITIES = {
    "ANSWERING_PHONE": "picks up the phone and answers a call",
    "CLEARING_TABLE": "takes dishes and bottles off the table, puts food and drinks back into the fridge",
    "COOKING": "heats milk or cooks pasta: pots, fridge or pantry, stove",
    "EATING": "sits on a dining room chair and eats, or only drinks",
    "ENTERING_HOME": "comes in from outside",
    "LEAVING_HOME": "goes out",
    "MAKING_PHONE_CALL": "calls somebody with the phone, anywhere in the home",
    "PREPARING_COLD_MEAL": "makes a sandwich or a salad with things from the fridge, without the stove",
    "SETTING_UP_TABLE": "lays tablecloth, dishes, cutlery and drinks on the table",
    "TAKING_MEDICINES": "takes medicine from its cabinet, with a drink, perhaps sitting down on any chair",
    "USING_PC": "sits on the office chair at the computer",
    "WASHING_DISHES": "washes dishes at the sink and puts them away",
    "WATCHING_TV": "switches the television on if it is off and sits on the couch or a chair; may leave it on for others",
    TRANSITION: "moves from one activity to the next, or pauses",
}

RULES = (
    "Each event has one label: the activity of the person who caused it. Events next to each other often belong to different people.",
    "Fridge, pantry and drawers serve several activities: decide by what the same person does before and after.",
    "An event that ends something (closed, turned OFF, released) usually belongs to the same activity as the event that began it.",
    "The door, the sink and the computer have no sensor: infer what happens there from the events around it.",
    "If unsure, give the likeliest label; never leave an event out.",
)

_EXAMPLE = (  # seconds from the start, sensor, ON, label: one person heats milk while another goes to watch television
    (0, "R7", True, "COOKING"),
    (4, "R7", False, "COOKING"),
    (11, "E2", True, "WATCHING_TV"),
    (19, "R5", True, "COOKING"),
    (21, "P8", True, "WATCHING_TV"),
    (23, "E1", True, "COOKING"),
)


def describe(sensor: str, on: bool) -> tuple[str, str, str]:
    """(room, name, state). A sensor that is not in the table keeps its id as its name."""
    if sensor not in SENSORS:
        return "", sensor, "turned ON" if on else "turned OFF"
    return (*SENSORS[sensor], KINDS[sensor[0]][1 if on else 2])


def home(transition: bool, smartphone: bool) -> Home:
    """The home as the prompt tells it, with TRANSITION as an activity and the phones as sensors only if asked."""
    told = [(room, name, *KINDS[sensor[0]]) for sensor, (room, name) in SENSORS.items() if smartphone or sensor not in PHONES]
    labels = tuple(Label(name, meaning) for name, meaning in ACTIVITIES.items() if transition or name != TRANSITION)
    listed = rooms((room, f"{name} ({kind}: {on}, {off})") for room, name, kind, on, off in told)
    return Home("marble", listed, labels, RULES, tuple(_example()))


def _example() -> Iterator[Event]:
    start = datetime(2018, 1, 1, 8, 41, 5)
    for number, (seconds, sensor, on, label) in enumerate(_EXAMPLE):
        room, name, state = describe(sensor, on)
        yield Event(number, start + timedelta(seconds=seconds), name, room, state, (label,))
