"""A data set by name: `READER:PATH` gives homes, and recordings and windows to iterate over, none of them kept.

    read("marble:~/MARBLE/dataset") -> Dataset -> windows("train") -> Window, Window, ...

Reading opens the files once, to learn who lived where and when, hence the groups and splits; the events are read again at each iteration.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Notes, Recording, Window
from harkd.homes.noise import apply, lost, parse_noise
from harkd.homes.options import ReadOptions, add_data_arguments, read_options
from harkd.homes import simulated
from harkd.homes.readers import READERS
from harkd.homes.splits import SPLITS, assign_splits, check_split
from harkd.homes.windows import windows

__all__ = ["Dataset", "ReadOptions", "Report", "add_data_arguments", "read", "read_options"]


@dataclass(frozen=True)
class Report:
    """What a pass over a data set counted. `labels` counts events by true label on offer, `windows` windows by split."""

    recordings: int = 0
    groups: int = 0
    residents: int = 0
    sensors: int = 0
    events: int = 0
    scored: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    unscored: dict[str, int] = field(default_factory=dict)
    noticed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """`index` holds the recordings without their events."""

    name: str
    homes: tuple[Home, ...]
    index: tuple[Recording, ...]
    options: ReadOptions = ReadOptions()

    @cached_property
    def _splits(self) -> dict[str, str]:
        return assign_splits((recording.group for recording in self.index), self.options.split_seed)

    def home(self, name: str) -> Home:
        for home in self.homes:
            if home.name == name:
                return home
        raise UserError(f"{self.name} has no home {name!r}: it has {', '.join(home.name for home in self.homes)}")

    def split_of(self, group: str) -> str:
        if group not in self._splits:
            raise UserError(f"{self.name} has no group {group!r}")
        return self._splits[group]

    def recordings(self, split: str = "all") -> Iterator[Recording]:
        check_split(split)
        return (recording for recording in self.index if split in ("all", self._splits[recording.group]))

    def windows(self, split: str = "all") -> Iterator[Window]:
        """The windows of a split, of the recordings with the noise that the options ask for."""
        return (window for recording in self.recordings(split) for window in self._windows(recording))

    def lost(self, split: str = "all") -> Iterator[tuple[Recording, Event]]:
        """The events of a split that the noise drops, in no window therefore."""
        noise = parse_noise(self.options.noise)
        return ((recording, event) for recording in self.recordings(split) for event in lost(recording, noise, self.options.noise_seed))

    def _windows(self, recording: Recording) -> Iterator[Window]:
        return windows(apply(recording, parse_noise(self.options.noise), self.options.noise_seed), self.options.window)

    def survey(self) -> Report:
        """Read everything once and count it."""
        labels, sizes, notes = Counter[str](), Counter[str](), Notes()
        sensors: set[tuple[str, str, str]] = set()
        events = scored = 0
        for recording in self.index:
            notes.add(recording.notes())
            for window in self._windows(recording):
                sizes[self.split_of(window.group)] += 1
                events += len(window.events)
                scored += sum(bool(event.labels) for event in window.events)
                labels.update(label for event in window.events for label in event.labels)
                sensors.update((window.home, event.room, event.sensor) for event in window.events)
        return Report(
            recordings=len(self.index),
            groups=len(self._splits),
            residents=len({(recording.home.name, resident) for recording in self.index for resident in recording.residents}),
            sensors=len(sensors),
            events=events,
            scored=scored,
            labels=dict(labels.most_common()),
            windows={split: sizes[split] for split in SPLITS},
            repaired=dict(notes.repaired.most_common()),
            unscored=dict(notes.unscored.most_common()),
            noticed=dict(notes.noticed.most_common()),
        )


def read(data: str, options: ReadOptions = ReadOptions(), **overrides: Any) -> Dataset:
    """Open `READER:PATH`. `overrides` are fields of ReadOptions: `read("marble:PATH", transition="label")`."""
    options = replace(options, **overrides)
    reader, _, path = data.partition(":")
    if reader == "simulated":
        return Dataset(data, *simulated.read(path), options)
    known = ", ".join(["simulated", *(f"{name}:PATH" for name in READERS)])
    if reader not in READERS:
        raise UserError(f"unknown data {data!r}: name it as READER:PATH, one of {known}")
    if not path:
        raise UserError(f"{data!r} names no folder: write {reader}:PATH")
    folder = Path(os.path.expanduser(path))  # leaves ~nobody as it is, where Path.expanduser raises
    if not folder.is_dir():
        raise UserError(f"{data!r}: there is no folder {path}")
    homes, recordings = READERS[reader](folder, options)
    stuck = parse_noise(options.noise).stuck
    if isinstance(stuck, str) and not any(stuck in sensor for home in homes for _, sensors in home.rooms for sensor in sensors):
        raise UserError(f"--noise stuck={stuck}: no home of {data} has a sensor of that name")
    return Dataset(data, homes, recordings, options)
