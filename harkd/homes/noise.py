"""Faults of sensors and clocks, put into a recording before it is cut into windows.

    drop=0.1      this share of the events is lost
    jitter=30s    every time moves by up to so much, either way
    ghost=0.05    before this share of the events comes one that nobody caused: a sensor shows again one of its latest states
    stuck=0.05    this share of the sensors, or the sensor named, shows for ever the first state that it has in a recording
    rename=0.1    this share of the sensors bears a name that nobody knows
    swap-rooms    each room bears another's name
    shift=2h      the clock is fast by so much; shift=-2h: slow
    speed=0.5     people act at half the speed: the time between events doubles

An event keeps its id and its truth, so that scores can be paired with those of the recording as it was. A ghost's id is negative, and it
has no label. What befalls an event is drawn by the SHA-512 of seed, home, recording and id, what befalls a sensor by that of seed, home,
room and sensor: the same on every machine, and a higher share takes what a lower one takes and more, so that curves compare like with like.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from itertools import count

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Recording

SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
SHARE = (0, 1, "a share from 0 to 1")
KINDS = {  # by name in a specification: the least and the most, and how it is written
    "drop": SHARE,
    "jitter": (0, 86400, "a time from 0s to 1d"),
    "ghost": SHARE,
    "stuck": (0, 1, "a share from 0 to 1 or a sensor's name"),
    "rename": SHARE,
    "swap-rooms": (1, 1, "no value"),
    "shift": (-86400 * 3650, 86400 * 3650, "a time from -3650d to 3650d"),
    "speed": (0.01, 100, "a number from 0.01 to 100"),
}
STATES = 2  # latest states of a sensor that its ghosts choose among


@dataclass(frozen=True)
class Noise:
    """Shares are 0 to 1, times seconds; `stuck` is a share or a sensor's name."""

    drop: float = 0.0
    jitter: float = 0.0
    ghost: float = 0.0
    stuck: float | str = 0.0
    rename: float = 0.0
    swap_rooms: bool = False
    shift: float = 0.0
    speed: float = 1.0


def parse_noise(spec: str) -> Noise:
    """Read "drop=0.1,jitter=30s,swap-rooms"; "" is no noise. Raises UserError naming the part that is wrong."""
    values: dict[str, float | str | bool] = {}
    for part in map(str.strip, spec.split(",") if spec else ()):
        name, equals, text = part.partition("=")
        if name not in KINDS:
            raise UserError(f"--noise {spec}: there is no noise {part!r}: choose among {', '.join(KINDS)}")
        if name.replace("-", "_") in values:
            raise UserError(f"--noise {spec}: {name} is given twice")
        value = _value(name, text.strip() if equals else None)
        if value is None:
            raise UserError(f"--noise {spec}: {part!r} is wrong: {name} takes {KINDS[name][2]}")
        values[name.replace("-", "_")] = value
    return Noise(**values)


def _value(name: str, text: str | None) -> float | str | bool | None:
    """The value of one part, `text` being what follows its "="; None if it cannot be."""
    if name == "swap-rooms":
        return True if text is None else None
    match = re.fullmatch(r"(-?[0-9]*\.?[0-9]+)([smhd]?)", text or "")
    if name == "stuck" and text and not (match and not match[2]):
        return text
    if match is None or bool(match[2]) != (name in ("jitter", "shift")):
        return None
    number, (lowest, highest, _) = float(match[1]) * SECONDS[match[2]], KINDS[name]
    return number if lowest <= number <= highest else None


def apply(recording: Recording, noise: Noise, seed: int = 0) -> Recording:
    """The recording with noise, whose events are a stream as before: what is held is the events of two jitters and what sensors showed."""
    return recording if noise == Noise() else replace(recording, events=lambda: _in_order(recording, noise, seed))


def lost(recording: Recording, noise: Noise, seed: int = 0) -> Iterator[Event]:
    """The events that `apply` drops, as they were."""
    return (event for event in (recording.events() if noise.drop else ()) if _draws(seed, recording, event)[0] < noise.drop)


def _in_order(recording: Recording, noise: Noise, seed: int) -> Iterator[Event]:
    """Jitter may bring later events before earlier ones: hold each back until no other can overtake it."""
    held: list[tuple[datetime, int, Event]] = []
    bound, number = timedelta(seconds=noise.jitter), count()
    for time, events in _noisy(recording, noise, seed):
        for event in events:
            heapq.heappush(held, (event.time, next(number), event))
        while held and held[0][0] <= time - bound:
            yield heapq.heappop(held)[2]
    while held:
        yield heapq.heappop(held)[2]


def _noisy(recording: Recording, noise: Noise, seed: int) -> Iterator[tuple[datetime, list[Event]]]:
    """For each event its time, jitter apart, and what becomes of it: perhaps a ghost, then itself unless it is lost."""
    seen: dict[tuple[str, str], list[str]] = {}  # (room, sensor): its latest states, of a stuck one the first
    fate = _fates(recording.home, noise, seed)
    start = before = None
    for event in recording.events():
        drop, jitter, ghost, ghost_time, ghost_sensor, ghost_state, *_ = _draws(seed, recording, event)
        start = start or event.time
        time = start + (event.time - start) / noise.speed + timedelta(seconds=noise.shift)
        before, since = time, time - (before or time)
        sensor, made = (event.room, event.sensor), []
        if ghost < noise.ghost and seen:
            other = list(seen)[int(ghost_sensor * len(seen))]
            room, name, _ = fate(*other)
            made.append(Event(-1 - event.id, time - ghost_time * since, name, room, seen[other][int(ghost_state * len(seen[other]))]))
        room, name, stuck = fate(*sensor)
        state = seen[sensor][0] if stuck and sensor in seen else event.state
        seen[sensor] = [*(other for other in seen.get(sensor, ()) if other != state), state][-STATES:]
        if drop >= noise.drop:
            moved = time + timedelta(seconds=(2 * jitter - 1) * noise.jitter)
            made.append(replace(event, time=moved, room=room, sensor=name, state=state))
        yield time, made


def _fates(home: Home, noise: Noise, seed: int) -> Callable[[str, str], tuple[str, str, bool]]:
    """Gives for a room and a sensor the names that they bear under the noise, and whether the sensor is stuck."""
    rooms = sorted((room for room, _ in home.rooms), key=lambda room: _uniform(seed, home.name, "room", room))
    swapped = dict(zip(rooms, [*rooms[1:], *rooms[:1]])) if noise.swap_rooms else {}

    @cache
    def fate(room: str, sensor: str) -> tuple[str, str, bool]:
        rename, number, stuck, *_ = _uniform(seed, home.name, "sensor", room, sensor)
        name = f"device {int(number * 1e6):06}" if rename < noise.rename else sensor
        return swapped.get(room, room), name, sensor == noise.stuck if isinstance(noise.stuck, str) else stuck < noise.stuck

    return fate


def _draws(seed: int, recording: Recording, event: Event) -> list[float]:
    return _uniform(seed, recording.home.name, "event", recording.id, event.id)


def _uniform(seed: int, *what: str | int) -> list[float]:
    """Eight numbers in [0, 1), the same wherever and whenever they are drawn."""
    digest = hashlib.sha512(json.dumps((seed, *what)).encode()).digest()
    return [(int.from_bytes(digest[at : at + 8], "big") >> 11) / 2**53 for at in range(0, 64, 8)]
