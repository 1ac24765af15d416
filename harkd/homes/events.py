"""The data of a home, from the widest to the narrowest: Home, Recording, Window, Event.

A recording's events are read anew at each call of `events()` and never kept, so a data set may be larger than memory.
What is ground truth (labels, residents, the names of recordings and groups) never reaches a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Event:
    """One sensor event. `labels` are its true labels that are on offer: none (unscored), one, or several where nobody knows who acted."""

    id: int  # position among the sensor events of its recording, from 0
    time: datetime  # local clock, naive
    sensor: str
    room: str  # may be ""
    state: str
    labels: tuple[str, ...] = ()
    resident: str = ""

    @property
    def description(self) -> str:
        """`<room> <sensor> <state>` with single blanks."""
        return " ".join(f"{self.room} {self.sensor} {self.state}".split())


@dataclass(frozen=True)
class Label:
    """An activity on offer, spelt as in the data set, and what it means where the data set says so."""

    name: str
    description: str = ""


@dataclass(frozen=True)
class Home:
    """What the system message tells of a home. `rooms` pairs each room with its sensors and appliances; `example` has labelled events."""

    name: str
    rooms: tuple[tuple[str, tuple[str, ...]], ...]
    labels: tuple[Label, ...]
    rules: tuple[str, ...] = ()
    example: tuple[Event, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)


@dataclass
class Notes:
    """What a reader did to a recording, counted by cause.

    repaired: the data contradicted itself and was read in the one way that makes sense. unscored: events without a label on offer.
    noticed: odd, but kept as it stands.
    """

    repaired: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)

    def add(self, other: Notes) -> None:
        self.repaired += other.repaired  # += also drops causes that never came up
        self.unscored += other.unscored
        self.noticed += other.noticed


@dataclass(frozen=True)
class Recording:
    """An uninterrupted stretch of events in one home. `group` is unique in the data set; recordings of a group never stand on both sides
    of a split. `events` and `notes` read the recording anew at each call."""

    id: str
    home: Home
    group: str
    residents: tuple[str, ...]
    events: Callable[[], Iterator[Event]]
    notes: Callable[[], Notes] = Notes
    scenario: str = ""  # what was acted out, where the data set says so


@dataclass(frozen=True)
class Window:
    """Consecutive events of one recording, put to a model in one prompt. `id` is unique in the data set, `home` is the home's name."""

    id: str
    home: str
    group: str
    recording: str
    events: tuple[Event, ...]
