"""What any model has to beat: answers counted from the training events' labels alone.

`majority` always gives the most frequent label, `sensor` the one that was most frequent at the event's sensor (a room and a name, whatever
the home), or the majority at a sensor that was never labelled in training. An event with several labels counts once for each.
Ties go to the label that comes first in the home's list.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harkd.errors import UserError
from harkd.homes.events import Window

Sensor = tuple[str, str]  # room, name


@dataclass(frozen=True)
class Majority:
    label: str

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> Majority:
        """Learn from training windows; `labels` are those on offer, in the home's order. UserError if no event has a label."""
        return cls(_most_frequent(sum(_count(windows).values(), Counter()), labels))

    def predict(self, window: Window) -> list[str]:
        return [self.label] * len(window.events)


@dataclass(frozen=True)
class SensorLookup:
    label_of: Mapping[Sensor, str]
    majority: str

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> SensorLookup:
        """Learn from training windows; `labels` are those on offer, in the home's order. UserError if no event has a label."""
        counts = _count(windows)
        label_of = {sensor: _most_frequent(of_sensor, labels) for sensor, of_sensor in counts.items()}
        return cls(label_of, _most_frequent(sum(counts.values(), Counter()), labels))

    def predict(self, window: Window) -> list[str]:
        return [self.label_of.get((event.room, event.sensor), self.majority) for event in window.events]


def baseline(name: str) -> type[Majority] | type[SensorLookup]:
    """The baseline of that name, to be fitted; UserError if there is none."""
    known = {"majority": Majority, "sensor": SensorLookup}
    if name not in known:
        raise UserError(f"there is no baseline {name!r}: choose one of {', '.join(known)}")
    return known[name]


def _count(windows: Iterable[Window]) -> dict[Sensor, Counter[str]]:
    counts: dict[Sensor, Counter[str]] = defaultdict(Counter)
    for window in windows:
        for event in window.events:
            if event.labels:
                counts[event.room, event.sensor].update(event.labels)
    if not counts:
        raise UserError("the training windows have no labelled event, so a baseline has nothing to learn: choose other data")
    return counts


def _most_frequent(counts: Counter[str], labels: Sequence[str]) -> str:
    return min(counts, key=lambda label: (-counts[label], labels.index(label)))
