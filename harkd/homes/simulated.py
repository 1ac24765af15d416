"""Simulated homes: residents who follow daily scripts at the same time, seen through sensors; endless, seeded, and free of anybody's data.

    simulated         home D0                    families of homes:  P  to pretrain the nano models
    simulated:T3      home 3 of family T                             D  to distil on, and its test
                                                                     T  to see what a student keeps in another home

A home is drawn from its name: rooms, sensors, what they and the activities are called, and 1 to 4 residents with habits of their own.
Some homes have one label for related activities, such as all meals. Layout, sensor names and labels each belong to one family by their
hash, so that no home of D or T repeats one of P; their words all occur in P. A day is drawn from (home, day). Activities share sensors and
are told apart by order (coats, then door), by the time of day (meals) or by another sensor (console and television); motion sensors see
whoever is there; some events do not say what they belong to, and no reader can know.
A recording is a day, and a group of its own: residents sleep through midnight.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import NamedTuple, TypeVar

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Recording, Window
from harkd.homes.simulated_world import ACTIVITIES, KINDS, MERGED, MOTION_NAMES, ROOMS, RULES, THINGS, plain

FAMILIES = {"P": range(0, 12), "D": range(12, 14), "T": range(14, 16)}  # shares of a hash's 16 values
DAYS = 56
FIRST_DAY = datetime(2024, 1, 1)
OPTIONAL = ("console", "lamp", "computer", "cabinet", "wardrobe", "coats", "shower", "toilet")
MISSING_OFF = 0.03  # share of ends that no sensor reports
GHOSTS = 0.02  # events that nobody caused, to those that somebody did: they are not scored
MERGES = 0.3  # chance of a home to have one label for related activities, for each such group
DAYTIMES = ((6, "night"), (11, "morning"), (14, "midday"), (18, "afternoon"), (23, "evening"), (24, "night"))  # until that hour
STRAY = 0.15  # share of long stays in which something is touched that has nothing to do with them


Drawn = TypeVar("Drawn")


class Sensor(NamedTuple):
    """One sensor: its room and its own name as the home has them, and its kind."""

    room: str
    name: str
    kind: str


@dataclass(frozen=True)
class House:
    """What the simulator knows and a prompt does not tell: who lives there, and which sensor and label stand for what."""

    name: str
    home: Home
    residents: tuple[str, ...]
    sensors: dict[str, tuple[Sensor, ...]]  # of each thing; one for each resident where people have their own
    motion: dict[str, Sensor]  # of each room, by ROOMS' name
    labels: dict[str, str]  # activity: its name in this home
    words: dict[str, tuple[str, str]]  # kind: on, off


class _Act(NamedTuple):
    """An event before the home's words are put to it."""

    time: float  # seconds of the day
    sensor: Sensor
    on: bool
    activity: str
    resident: str


def read(name: str) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The home of that name, D0 where it is empty, and DAYS days of it."""
    home = house(name or "D0")
    return (home.home,), recordings(home)


def house(name: str) -> House:
    """Draw the home of a name such as "D0". Raises UserError for another name."""
    match = re.fullmatch(r"([PDT])([0-9]{1,9})", name)
    if not match:
        raise UserError(f"there is no simulated home {name!r}: name it as P, D or T and a number, for instance simulated:D0")
    family, rng = FAMILIES[match[1]], Random(f"house {name}")
    residents = tuple(f"R{i + 1}" for i in range(rng.choice((1, 2, 2, 3, 4))))
    things, rooms = _drawn(family, partial(_layout, rng, len(residents)))
    sensors, motion = _drawn(family, partial(_sensors, rng, things, rooms, len(residents)))
    labels = _drawn(family, partial(_labels, rng, things))
    words = {kind: rng.choice(choices) for kind, choices in KINDS.items()}
    describe, rules = rng.random() < 0.7, tuple(rng.sample(RULES, rng.randint(2, 4)))
    known = ACTIVITIES | MERGED
    told = tuple((label, known[plain(label)].meaning if describe else "") for label in dict.fromkeys(labels.values()))
    listed: dict[str, list[str]] = {}
    for sensor in (*motion.values(), *(sensor for places in sensors.values() for sensor in places)):
        on, off = words[sensor.kind]
        listed.setdefault(sensor.room, []).append(f"{sensor.name} ({on}, {off})")
    rooms_told = tuple((room, tuple(dict.fromkeys(names))) for room, names in listed.items())
    drawn = House(name, Home(name, rooms_told, tuple(Label(*label) for label in told), rules), residents, sensors, motion, labels, words)
    example = tuple(event for event in _events(drawn, 0) if event.labels)  # day 0 is no recording
    start = rng.randrange(max(1, len(example) - 4))
    return replace(drawn, home=replace(drawn.home, example=example[start : start + 4]))


def recordings(home: House, days: range = range(1, DAYS + 1)) -> tuple[Recording, ...]:
    """These days of a home, one recording each."""
    return tuple(Recording(f"day{n:02d}", home.home, f"day{n:02d}", home.residents, partial(_events, home, n)) for n in days)


def _drawn(family: range, draw: Callable[[], Drawn]) -> Drawn:
    """Draw again and again until the draw's hash belongs to the family."""
    while True:
        value = draw()
        if hashlib.sha256(repr(value).encode()).digest()[0] % 16 in family:
            return value


def _layout(rng: Random, residents: int) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(things, (room, its name) of each room)."""
    absent = set(rng.sample(OPTIONAL, rng.randint(0, 4)))
    things = tuple(thing for thing in THINGS if thing not in absent)
    numbered = rng.random() < 0.3
    ones = ("bedroom", "bathroom") if numbered and residents == 1 else ()
    return things, tuple((room, rng.choice(names) + (" 1" if room in ones else "")) for room, names in ROOMS.items())


def _sensors(
    rng: Random, things: tuple[str, ...], rooms: tuple[tuple[str, str], ...], residents: int
) -> tuple[dict[str, tuple[Sensor, ...]], dict[str, Sensor]]:
    """(sensors of each thing, motion sensor of each room that has one)."""
    name_of, sensors = dict(rooms), {}
    for thing in things:
        room, kind, names = THINGS[thing]
        name, own = rng.choice(names), residents if thing in ("bed", "chair") else 1
        numbers = [""] if own == 1 else [f" {i + 1}" for i in range(own)]
        places = [(number, "") if thing == "bed" else ("", number) for number in numbers]  # beds stand in rooms of their own
        sensors[thing] = tuple(Sensor(f"{name_of[room]}{one}", f"{name}{other}", kind) for one, other in places)
    motion_name = rng.choice(MOTION_NAMES)
    with_motion = rng.sample([room for room in ROOMS if room != "bedroom"], rng.randint(1, 4))
    return sensors, {room: Sensor(name_of[room], motion_name, "motion") for room in ROOMS if room in with_motion}


def _labels(rng: Random, things: tuple[str, ...]) -> dict[str, str]:
    """The name of each activity that the things allow, in an order of the home's own."""
    possible = [name for name, activity in ACTIVITIES.items() if _things(activity.scripts) <= set(things) and name != "wake"]
    offered = rng.sample(possible, len(possible))
    blank = rng.choice((" ", " ", "_"))
    labels = {activity: rng.choice(ACTIVITIES[activity].names).replace(" ", blank) for activity in offered}
    for merged in MERGED.values():
        name = rng.choice(merged.names).replace(" ", blank)
        if rng.random() < MERGES:
            labels |= {activity: name for activity in offered if activity in merged.activities}
    return labels | {"wake": labels["sleep"]}


def _things(scripts: tuple[str, ...]) -> set[str]:
    return {word.strip("+-?") for script in scripts for word in script.split()} & THINGS.keys()


def _events(home: House, day: int) -> Iterator[Event]:
    """The events of a day, in the order of time."""
    rng = Random(f"day {home.name} {day}")
    acts = [act for i, resident in enumerate(home.residents) for act in _day_of(home, rng, i, resident)]
    acts += [
        _Act(rng.uniform(6, 23) * 3600, rng.choice(list(home.motion.values())), True, "", "") for _ in range(round(GHOSTS * len(acts)))
    ]
    on: dict[Sensor, bool] = {}
    number = 0
    for act in sorted(acts):
        if act.sensor.kind == "motion" and on.get(act.sensor, False) == act.on:
            continue  # it tells of changes alone
        if not act.on and rng.random() < MISSING_OFF:
            continue
        on[act.sensor] = act.on
        labels = (home.labels[act.activity],) if act.activity in home.labels else ()
        time = FIRST_DAY + timedelta(days=day, seconds=int(act.time))
        state = home.words[act.sensor.kind][0 if act.on else 1]
        yield Event(number, time, act.sensor.name, act.sensor.room, state, labels, act.resident)
        number += 1


def _day_of(home: House, rng: Random, index: int, resident: str) -> Iterator[_Act]:
    """What one resident does on one day, one activity behind the other."""
    habits = Random(f"habits {home.name} {resident}")
    shift, likes = habits.gauss(0, 0.5), {activity: habits.uniform(0.4, 1.2) for activity in ACTIVITIES}
    agenda = sorted(
        (hour + shift + rng.gauss(0, 0.4), name)
        for name, activity in ACTIVITIES.items()
        if _things(activity.scripts) <= home.sensors.keys()
        for hour, chance in activity.slots
        if rng.random() < (chance if chance == 1 else chance * likes[name])
    )
    clock, back = 0.0, None
    for hour, name in agenda:
        start = max(hour * 3600, clock + rng.uniform(20, 240))
        if back is not None and start < back and name != "sleep":
            continue
        if back is not None and "coats" in home.sensors:
            clock = yield from _run(home, rng, index, resident, "enter", back)
            start, back = max(start, clock + 30), None
        clock = yield from _run(home, rng, index, resident, name, start)
        if name == "leave":
            back = clock + rng.uniform(1, 5) * 3600


def _run(home: House, rng: Random, index: int, resident: str, name: str, clock: float) -> Iterator[_Act]:
    """Play a script of an activity from `clock` on. Returns when it ends."""
    room = None

    def act(sensor: Sensor, on: bool) -> _Act:
        return _Act(clock, sensor, on, name, resident)

    for step in rng.choice(ACTIVITIES[name].scripts).split():
        if step.endswith("?"):
            if rng.random() < 0.5:
                continue
            step = step[:-1]
        if step.endswith("m"):
            stay = float(step[:-1]) * rng.uniform(30, 90)
            if stay > 600 and rng.random() < STRAY:
                stray = home.sensors[rng.choice(("fridge", "drawer", "basin"))][0]
                yield _Act(clock + stay * 0.4, stray, True, name, resident)
                yield _Act(clock + stay * 0.4 + 5, stray, False, name, resident)
            clock += stay
            continue
        thing, places = step.rstrip("+-"), home.sensors[step.rstrip("+-")]
        if THINGS[thing].room != room:
            if room in home.motion:
                yield _Act(clock + rng.uniform(1, 20), home.motion[room], False, name, resident)
            room = THINGS[thing].room
            if room in home.motion:
                clock += rng.uniform(2, 10)
                yield act(home.motion[room], True)
        clock += rng.uniform(2, 20)
        sensor = places[index % len(places)]
        if not step.endswith("-"):
            yield act(sensor, True)
        if not step.endswith("+"):
            clock += 0 if step.endswith("-") else rng.uniform(2, 12)
            yield act(sensor, False)
    if room in home.motion:
        yield _Act(clock + rng.uniform(5, 40), home.motion[room], False, name, resident)
    return clock


def reasoning(home: House, window: Window, labels: Sequence[str]) -> str:
    """A short thought that leads to `labels`, a line for each event: the time of day, the thing it came from and what it belongs to in
    words that are the same in all homes ("unclear" where nobody caused it), and what this home calls that."""
    sensors = home.sensors | {"motion": tuple(home.motion.values())}
    things = {(sensor.room, sensor.name): thing for thing, own in sensors.items() for sensor in own}
    lines = []
    for number, (event, label) in enumerate(zip(window.events, labels, strict=True), 1):
        part = next(part for end, part in DAYTIMES if event.time.hour < end)
        lines.append(f"{number} {part} {things[event.room, event.sensor]}: {plain(label) if event.labels else 'unclear'} {label}")
    return "\n".join(lines)
