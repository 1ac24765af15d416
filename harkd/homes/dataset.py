"""A data set by name: `READER:PATH` gives homes, and recordings and windows to iterate over, none of them kept.

    read("marble:~/MARBLE/dataset") -> Dataset -> windows("train") -> Window, Window, ...

Reading opens the files once, to learn who lived where and when, hence the groups and splits; the events are read again at each iteration.
"""

from __future__ import annotations

import hashlib
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
from harkd.homes.splits import SPLITS, check_split, sides
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
    def _sides(self) -> dict[tuple[str, str], str | None]:
        """The side of each (home, recording)."""
        options = self.options
        found = sides(self.index, options.split_by, options.split_seed, options.folds, options.fold)
        return {(recording.home.name, recording.id): side for recording, side in zip(self.index, found, strict=True)}

    @property
    def left_out(self) -> int:
        """How many recordings stand on no side of the split; with folds, in the fold that leaves out most."""
        return max(list(part._sides.values()).count(None) for part in (self, *self.folded()))

    def folded(self) -> list[Dataset]:
        """The data set once for each of its folds, or as it is where it is not divided into folds, or one of them is chosen."""
        numbers = range(1, self.options.folds + 1) if not self.options.fold else ()
        return [replace(self, options=replace(self.options, fold=number)) for number in numbers] or [self]

    def home(self, name: str) -> Home:
        for home in self.homes:
            if home.name == name:
                return home
        raise UserError(f"{self.name} has no home {name!r}: it has {', '.join(home.name for home in self.homes)}")

    def side_of(self, recording: Recording | Window) -> str | None:
        """The side on which a recording or window stands, None for neither."""
        name = (recording.home.name, recording.id) if isinstance(recording, Recording) else (recording.home, recording.recording)
        if name not in self._sides:
            raise UserError(f"{self.name} has no recording {name[1]!r}")
        return self._sides[name]

    def recordings(self, split: str = "all") -> Iterator[Recording]:
        if check_split(split) != "all" and self.options.folds and not self.options.fold:
            raise UserError(f"--folds {self.options.folds} makes folds, none of which is {split}: choose the one that tests with --fold")
        return (recording for recording in self.index if split == "all" or self.side_of(recording) == split)

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
        """Read everything and count it."""
        labels, sizes, notes = Counter[str](), Counter[str](), Notes()
        sensors: set[tuple[str, str, str]] = set()
        parts = self.folded()
        names = SPLITS if len(parts) == 1 else [f"fold {part.options.fold}" for part in parts]
        events = scored = 0
        for recording in self.index:
            notes.add(recording.notes())
            for window in self._windows(recording):
                sizes[self.side_of(recording) or "left out"] += 1
                events += len(window.events)
                scored += sum(bool(event.labels) for event in window.events)
                labels.update(label for event in window.events for label in event.labels)
                sensors.update((window.home, event.room, event.sensor) for event in window.events)
        return Report(
            recordings=len(self.index),
            groups=len({recording.group for recording in self.index}),
            residents=len({(recording.home.name, resident) for recording in self.index for resident in recording.residents}),
            sensors=len(sensors),
            events=events,
            scored=scored,
            labels=dict(labels.most_common()),
            windows={split: sizes[split] for split in (*names, *(["left out"] if sizes["left out"] else []))},
            **{kind: dict(getattr(notes, kind).most_common()) for kind in ("repaired", "unscored", "noticed")},
        )


def content_digest(data: str) -> str | None:
    """16 hex digits of the files under the PATH of `READER:PATH`: names, sizes and bytes, of 256 MiB and more the first 64 KiB of each.

    Of a simulated home, what is drawn of it; None without files. Hidden files and runs of harkd's are left aside. Raises UserError for a
    file that cannot be read.
    """
    reader, _, path = data.partition(":")
    if reader == "simulated":
        return hashlib.sha256(repr(simulated.house(path or "D0")).encode()).hexdigest()[:16]
    root, files, digest = os.path.expanduser(path), [], hashlib.sha256()
    for folder, inner, names in os.walk(root):
        if "settings.json" in names:
            inner.clear()
        else:
            files += [Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file()]
    try:
        sizes = {file: file.stat().st_size for file in sorted(files)}
        small = sum(sizes.values()) < 1 << 28
        for file, size in sizes.items():
            digest.update(f"{file.relative_to(root)} {size}\n".encode(errors="surrogateescape"))
            with open(file, "rb") as opened:
                digest.update(opened.read(size if small else 1 << 16))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16] if files else None


def group_digest(of: Window | Any) -> str:
    """16 hex digits for the home and group of a window or trace: an adapter's notes do not name whom it was trained on."""
    return hashlib.sha256(f"{of.home} {of.group}".encode()).hexdigest()[:16]


def read(data: str, options: ReadOptions = ReadOptions(), **overrides: Any) -> Dataset:
    """Open `READER:PATH`. `overrides` are fields of ReadOptions: `read("marble:PATH", transition="label")`."""
    options = replace(options, **overrides)
    homes, recordings = _opened(data, options)
    stuck = parse_noise(options.noise).stuck
    names = (name for home in homes for _, sensors in home.rooms for sensor in sensors for name in (sensor, sensor.rpartition(" (")[0]))
    if isinstance(stuck, str) and stuck not in names:
        raise UserError(f"--noise stuck={stuck}: no home of {data} has a sensor of that name")
    return Dataset(data, homes, recordings, options)


def _opened(data: str, options: ReadOptions) -> tuple[tuple[Home, ...], tuple[Recording, ...]]:
    """The homes and recordings of `READER:PATH`. Raises UserError where there is no such reader or folder."""
    reader, _, path = data.partition(":")
    if reader == "simulated":
        return simulated.read(path)
    known = ", ".join(["simulated", *(f"{name}:PATH" for name in READERS)])
    if reader not in READERS:
        raise UserError(f"unknown data {data!r}: name it as READER:PATH, one of {known}")
    if not path:
        raise UserError(f"{data!r} names no folder: write {reader}:PATH")
    folder = Path(os.path.expanduser(path))  # leaves ~nobody as it is, where Path.expanduser raises
    if not os.path.isdir(folder):  # False too where no name can be so long
        raise UserError(f"{data!r}: there is no folder {path}")
    return READERS[reader](folder, options)
