"""Activities as they happen, for other programs: a Recognizer labels lists of events, Live takes them one by one.

A window is labelled as soon as it is full, or when its oldest event has waited long enough. Until then its prompt is computed as far as it
is known: a full window lacks no more of it than its last event. The prompt that all windows share is computed once and stays in the cache.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from queue import Empty, Queue
from threading import Lock
from typing import TYPE_CHECKING, Any

from harkd.errors import UserError
from harkd.homes.dataset import read
from harkd.homes.events import Event, Home, Window
from harkd.homes.readers.csv_home import read_home
from harkd.qwen3.template import split_completion
from harkd.recognition import Guiding, Machine, check_fit, load_generator, mode, probabilities, read_answer, request
from harkd.sampling.request import Sampling, recommended

if TYPE_CHECKING:
    from harkd.sampling.generator import Generator

CAPACITY = 1 << 14  # events that may wait


@dataclass(frozen=True)
class Recognition:
    """An event and the activity behind it, None where the model gave no answer; `reasoning` is that of its window, "" without."""

    event: Event
    activity: str | None
    probability: float | None
    reasoning: str = ""


class Recognizer:
    """A model that names activities in one home. Any number of threads may use it: they take turns, a batch of windows each.

    Args: window: events labelled together; thinking: reason before the answer; rules: those of the home, in the prompt.
    """

    def __init__(
        self, generator: Generator, home: Home, sampling: Sampling, thinking: bool = False, window: int = 10, rules: bool = True
    ) -> None:
        if window < 1:
            raise UserError(f"a window holds at least one event, not {window}")
        self.generator, self.home, self.window = generator, home, window
        self._how = _how(thinking, sampling, rules)

    @classmethod
    def load(
        cls, model: str, adapter: str | None = None, home: Home | str | Path = "home.json", *, thinking: bool | None = None,
        sampling: Sampling | None = None, window: int = 10, rules: bool = True, dtype: str | None = None, machine: Machine = Machine(),
    ) -> Recognizer:  # fmt: skip
        """`home` is a Home, a home.json, its folder, or READER:PATH, of which it takes the first home. `thinking` None: as the adapter was
        trained, else not; `sampling` None: what Qwen3 recommends with reasoning, the likeliest label without.
        """
        thinking = live_mode(adapter, thinking)
        sampling = sampling or (recommended(True) if thinking else replace(recommended(False), temperature=0.0))
        home = home if isinstance(home, Home) else find_home(home)
        events = tuple(Event(n, datetime.min, "sensor", "room", "state") for n in range(max(window, 1)))
        full = Window("a full window", home.name, "", "", events)
        check_fit(model, [request(home, full, **_how(thinking, sampling, rules))], machine)  # now, not hours later
        return cls(load_generator(model, adapter, dtype, machine), home, sampling, thinking, window, rules)

    def recognize(self, events: Iterable[Event]) -> Iterator[Recognition]:
        """Label events in their order, a batch of windows at a time; the last window is as short as it comes."""
        events = iter(events)
        while some := tuple(islice(events, self.window * self.generator.batch)):
            yield from self._label(some)

    def prepare(self, events: Iterable[Event]) -> None:
        """Compute the prompt of one or more events as far as it is known: `recognize`, if it comes next for these and more, goes on."""
        with self.generator.lock:
            self.generator.prepare(request(self.home, self._window(events), **self._how))

    def _window(self, events: Iterable[Event]) -> Window:
        events = tuple(events)
        name = f"{self.home.name}/{events[0].id}/{events[0].time}"  # it decides the noise, whatever runs beside it
        return Window(name, self.home.name, "", "", events)

    def _label(self, events: Sequence[Event]) -> list[Recognition]:
        windows = [self._window(events[i : i + self.window]) for i in range(0, len(events), self.window)]
        with self.generator.lock:
            asked = [request(self.home, window, **self._how) for window in windows]
            written = {done.request: done for done in self.generator.generate(asked)}  # equal requests have equal completions
        found = []
        for window, of_window in zip(windows, asked, strict=True):
            done, labels = written[of_window], self.home.label_names
            answer = read_answer(done.text, done.finish_reason, window, labels)
            reasoning = split_completion(done.text)[0].strip()
            given = probabilities(done, labels) or [{}] * len(window.events)
            for event, label, of in zip(window.events, answer.labels, given, strict=True):
                found.append(Recognition(event, label, of.get(label), reasoning))
        return found


def _how(thinking: bool, sampling: Sampling, rules: bool) -> dict[str, Any]:
    """How a window is asked; answers are always guided."""
    return {"thinking": thinking, "sampling": sampling, "rules": rules, "guiding": Guiding(guided=True)}


def check_wait(seconds: float) -> None:
    """Raise UserError for what is no longest wait."""
    if not 0 < seconds <= 1e6:
        raise UserError(f"max-wait is a number of seconds above 0, at most a million, not {seconds}")


class Live:
    """Events one by one: `put` them from any threads, iterate in one over what is recognised, in the order in which they were put.

    Iterating ends when `close` was called and everything before it is labelled; broken off, it may begin again, and nothing is lost. `put`
    waits while `capacity` events do, and raises UserError behind `close`.
    """

    def __init__(self, recognizer: Recognizer, max_wait: float = 60.0, capacity: int = CAPACITY) -> None:
        check_wait(max_wait)
        self.recognizer, self.max_wait, self._closed = recognizer, max_wait, False
        self._queue: Queue[tuple[float, Event] | None] = Queue(capacity)
        self._waiting: deque[tuple[float, Event]] = deque()
        self._found: deque[Recognition] = deque()
        self._ended = False  # nothing more comes out of the queue
        self._door = Lock()  # no event comes behind the end

    def put(self, event: Event) -> None:
        now = time.monotonic()
        with self._door:
            if self._closed:
                raise UserError("this Live is closed: make another one for further events")
            self._queue.put((now, event))

    def close(self) -> None:
        with self._door:
            self._closed = True
            self._queue.put(None)

    def __iter__(self) -> Iterator[Recognition]:
        while True:
            while self._found:
                yield self._found.popleft()
            if self._ended and not self._waiting:
                return
            if not self._ended and 0 < len(self._waiting) < self.recognizer.window and self._left() and self._queue.empty():
                self.recognizer.prepare(event for _, event in self._waiting)
            due = self._due()
            found = list(self.recognizer.recognize(event for _, event in islice(self._waiting, due)))  # if it fails, they wait on
            for recognition in found:
                self._waiting.popleft()
                self._found.append(recognition)

    def _left(self) -> float | None:
        """Seconds that the oldest event may still wait, None where no event does."""
        return max(0.0, self._waiting[0][0] + self.max_wait - time.monotonic()) if self._waiting else None

    def _due(self) -> int:
        """Wait for an event, or until the oldest has waited for long enough. Returns how many are to be labelled now."""
        size, most = self.recognizer.window, self.recognizer.window * self.recognizer.generator.batch
        if not self._ended:
            try:
                item = self._queue.get(timeout=self._left())
            except Empty:
                return len(self._waiting)
            self._ended = item is None
            self._waiting.extend([] if item is None else [item])
        full, more = len(self._waiting) // size * size, not self._queue.empty()
        if self._ended or (self._left() == 0 and not more):
            return len(self._waiting)
        return full if not more or full >= most else 0


def live_mode(adapter: str | None, thinking: bool | None) -> bool:
    """As `mode`, but without reasoning where nobody asks for it: an answer is waited for."""
    return mode(adapter, thinking) if adapter is not None else bool(thinking)


def find_home(home: str | Path) -> Home:
    """The home of a home.json, of its folder, or of READER:PATH."""
    path = Path(os.path.expanduser(home))  # as os.path.exists, it raises for no name
    if os.path.exists(path):
        return read_home(path / "home.json" if path.is_dir() else path)
    if ":" in str(home) or home == "simulated":
        return read(str(home)).homes[0]
    raise UserError(f"there is no home {home}: name a home.json, its folder, or READER:PATH")
