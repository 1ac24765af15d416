"""What any model has to beat: answers learned from the training windows alone, each from the window that it labels and nothing before it.

`majority` always gives the most frequent label, `sensor` the one that was most frequent at the event's sensor (a room and a name, whatever
the home), or the majority at a sensor that was never labelled in training. Ties go to the label that comes first in the home's list.

`naive-bayes` takes four features of an event for independent: sensor and state, hour of the day, the sensors of the events before and after
it in its window. With n[l] the training events of label l, n[l, f, v] those whose feature f is v, and V[f] the values of f known, one more
for all others:

    log P(l | event) = log n[l] + sum_f log (n[l, f, v] + 1) / (n[l] + V[f]) + constant

`hmm`, `hmm-recording` and `bigru` see the order of events: harkd.scoring.sequence_baselines. An event with several labels counts once for
each, an unscored one not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from harkd.errors import UserError
from harkd.homes.events import Event, Window

BASELINES = ("majority", "sensor", "naive-bayes", "hmm", "hmm-recording", "bigru")
NOTHING = "the training windows have no labelled event, so a baseline has nothing to learn: choose other data"
Sensor = tuple[str, str]  # room, name


@dataclass(frozen=True)
class SensorLookup:
    label_of: Mapping[Sensor, str]
    majority: str

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> SensorLookup:
        """Learn from training windows; `labels` are those on offer, in the home's order. UserError if no event has a label."""
        counts: dict[Sensor, np.ndarray] = defaultdict(lambda: np.zeros(len(labels)))
        for window in windows:
            for event, row in zip(window.events, targets(window, labels)):
                if row.any():
                    counts[event.room, event.sensor] += row
        total = sum(counts.values(), np.zeros(len(labels)))
        seen_labels(total)
        return cls({sensor: labels[row.argmax()] for sensor, row in counts.items()}, labels[total.argmax()])

    def predict(self, window: Window) -> list[str]:
        return [self.label_of.get((event.room, event.sensor), self.majority) for event in window.events]


class Majority(SensorLookup):
    """Knows no sensor."""

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> Majority:
        """As SensorLookup's."""
        return cls({}, super().fit(windows, labels).majority)


@dataclass(frozen=True, eq=False)
class NaiveBayes:
    """`prior` [L] and the vectors [L] of `tables`, by value of each feature, and of `others` are logarithms."""

    labels: tuple[str, ...]
    prior: np.ndarray
    tables: tuple[dict[Hashable, np.ndarray], ...]
    others: tuple[np.ndarray, ...]

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> NaiveBayes:
        """Learn from training windows; `labels` are those on offer, in the home's order. UserError if no event has a label."""
        tables = [defaultdict(lambda: np.zeros(len(labels))) for _ in range(4)]
        for window in windows:
            for row, features in zip(targets(window, labels), _features(window)):
                if row.any():
                    for table, value in zip(tables, features):
                        table[value] += row
        total = sum(tables[0].values(), np.zeros(len(labels)))
        seen = seen_labels(total)
        logs = [{value: np.log((n[seen] + 1) / (total[seen] + len(table) + 1)) for value, n in table.items()} for table in tables]
        others = tuple(-np.log(total[seen] + len(table) + 1) for table in tables)
        return cls(tuple(labels[i] for i in seen), np.log(total[seen]), tuple(logs), others)

    def posterior(self, window: Window) -> np.ndarray:
        """The probability of each label for each event, [N, L]."""
        logs = np.array([self.prior + sum(map(dict.get, self.tables, features, self.others)) for features in _features(window)])
        odds = np.exp(logs - logs.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def predict(self, window: Window) -> list[str]:
        return [self.labels[i] for i in self.posterior(window).argmax(axis=1)]


def baseline(name: str) -> Any:
    """The class of that name, with `fit(windows, labels)` and `predict(window) -> list[str]`; UserError if there is none."""
    from harkd.scoring.sequence_baselines import BiGru, Hmm, RecordingHmm

    if name not in BASELINES:
        raise UserError(f"there is no baseline {name!r}: choose one of {', '.join(BASELINES)}")
    return dict(zip(BASELINES, (Majority, SensorLookup, NaiveBayes, Hmm, RecordingHmm, BiGru)))[name]


def answers(fitted: Any, windows: Iterable[Window]) -> Iterator[tuple[Window, list[str]]]:
    """Each window and its labels, from a baseline that sees windows one by one, or all windows of a recording at once (`whole`)."""
    for run in recordings(windows) if getattr(fitted, "whole", False) else ([window] for window in windows):
        labels = iter(fitted.predict(joined(run)))
        for window in run:
            yield window, [next(labels) for _ in window.events]


def recordings(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """The windows of one recording after the other."""
    return (list(run) for _, run in groupby(windows, key=lambda window: (window.home, window.recording)))


def joined(run: Sequence[Window]) -> Window:
    """Windows that follow each other as one."""
    return replace(run[0], events=tuple(event for window in run for event in window.events))


def targets(window: Window, labels: Sequence[str]) -> np.ndarray:
    """[N, L]: 1 at each event's labels, rows of zeros where it is unscored. ValueError for a label that is not on offer."""
    rows = np.zeros((len(window.events), len(labels)))
    for row, event in zip(rows, window.events):
        for label in event.labels:
            row[labels.index(label)] = 1
    return rows


def seen_labels(total: np.ndarray) -> np.ndarray:
    """The places of the labels that training events have, of `total` [L] events each. UserError if there is none."""
    if not total.any():
        raise UserError(NOTHING)
    return total.nonzero()[0]


def sensor_state(event: Event) -> tuple[str, str, str]:
    return event.room, event.sensor, event.state


def _features(window: Window) -> list[tuple[Hashable, ...]]:
    sensors = [None, *((event.room, event.sensor) for event in window.events), None]
    return [(sensor_state(event), event.time.hour, *pair) for event, *pair in zip(window.events, sensors, sensors[2:])]
