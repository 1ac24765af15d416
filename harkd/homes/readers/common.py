"""What the readers share: lines of a file as a stream, clocks, JSON, recordings that are read on demand, and rules that fit every home."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from harkd.errors import UserError
from harkd.homes.events import Event, Home, Notes, Recording

RULES = (
    "Each event has one label: the activity of the person who caused it. Events next to each other may belong to different people.",
    "A sensor that serves several activities says little alone: decide by what happens before and after.",
    "An event that ends something (OFF, closed, released) usually belongs to the same activity as the event that began it.",
    "If unsure, give the likeliest label; never leave an event out.",
)

_CLOCK = re.compile(r"([12][0-9]{3}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]+))?")


def clock(text: str) -> datetime | None:
    """The naive local time of `YYYY-MM-DD HH:MM:SS` with any number of decimals, years 1000 to 2999, None if it is none."""
    match = _CLOCK.fullmatch(text)
    try:
        return datetime.fromisoformat(f"{match[1]} {match[2]}.{(match[3] or '0')[:6]:0<6}") if match else None
    except ValueError:  # a 31st of February
        return None


def text_lines(path: Path, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int, str]]:
    """Yield (byte offset, line number, text) from the line on that begins at `offset`. A name in .gz is read through gzip."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(offset)
            for number, raw in enumerate(file, line):
                yield offset, number, raw.decode("utf-8" if offset else "utf-8-sig")
                offset += len(raw)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start} of line {number}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_json(path: Path, kind: type) -> Any:
    """The list or object that a JSON file holds."""
    text = "".join(text for _, _, text in text_lines(path))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}, line 1: should hold a JSON {'list' if kind is list else 'object'}")
    return value


def recording(id: str, home: Home, group: str, residents: Iterable[str], stream: Callable[[Notes], Iterator[Event]]) -> Recording:
    """A recording whose events `stream` reads, counting into the notes that it is given."""

    def notes() -> Notes:
        counted = Notes()
        for _ in stream(counted):
            continue
        return counted

    return Recording(id, home, group, tuple(residents), lambda: stream(Notes()), notes)


def rooms(sensors: Iterable[tuple[str, str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Home.rooms of (room, sensor) pairs, each once, in their order; what has no room is "anywhere"."""
    found: dict[str, dict[str, None]] = {}
    for room, sensor in sensors:
        found.setdefault(room or "anywhere", {})[sensor] = None
    return tuple((room, tuple(names)) for room, names in found.items())
