"""A recording cut into windows: runs of `size` consecutive events that do not overlap, the last one as short as it comes.

Only the position of an event decides its window, never its label: a window may hold events that are not scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from harkd.homes.events import Recording, Window


def windows(recording: Recording, size: int = 10) -> Iterator[Window]:
    """Window ids read `<home>/<recording>/<number>`, numbers from 0000."""
    events = recording.events()
    home, number = recording.home.name, 0
    while run := tuple(islice(events, size)):
        yield Window(f"{home}/{recording.id}/{number:04d}", home, recording.group, recording.id, run)
        number += 1
