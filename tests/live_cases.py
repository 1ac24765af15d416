"""A home, its events as objects and as lines, and a model that says what everybody knows: what the tests of live recognition share."""

import json
import threading
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

from harkd.homes.answer import canonical
from harkd.homes.events import Event, Home, Label
from harkd.live import Recognizer
from harkd.sampling.request import Sampling

HOME = Home("h", (("kitchen", ("fridge",)),), (Label("A"), Label("B")))
START = datetime(2024, 5, 1, 7)


def event(n: int) -> Event:
    return Event(n, START + timedelta(seconds=n), "fridge", "kitchen", f"state {n}")


def line(n: int, **more) -> bytes:
    return json.dumps({"time": str(START + timedelta(seconds=n)), "sensor": "fridge", "room": "kitchen", "state": f"state {n}", **more}).encode()


class Fake:
    """In the place of a Generator: says B where an event's number is odd; `calls` counts windows, `prepared` events, `wait` holds an answer back, `slow` what is prepared."""

    slow = 0.0

    def __init__(self, batch: int = 4, wait: float = 0.0) -> None:
        self.batch, self.calls, self.prepared, self.wait, self.inside, self.lock = batch, [], [], wait, 0, threading.Lock()

    def generate(self, requests):
        self.inside += 1
        assert self.inside == 1, "one at a time"
        requests = list(requests)
        self.calls.append(len(requests))
        time.sleep(self.wait)
        for asked in reversed(requests):  # as they end: in no fixed order
            events = json.loads(asked.prompt[asked.prompt.index("[\n") : asked.prompt.rindex("]") + 1])
            said = [int(e["description"].split()[-1]) % 2 for e in events]
            text = f"<think>\nodd or even\n</think>\n\n{canonical(['AB'[i] for i in said])}"
            yield SimpleNamespace(request=asked, text=text, finish_reason="stop", probabilities=[{i: 0.75} for i in said])
        self.inside -= 1

    def prepare(self, asked):
        assert not self.inside and self.lock.locked()
        self.prepared.append(asked.prompt.count("description"))
        time.sleep(self.slow)


def fake(batch: int = 4, wait: float = 0.0, window: int = 10) -> Recognizer:
    return Recognizer(Fake(batch, wait), HOME, Sampling(), window=window)


def right(found, numbers) -> bool:
    return [(it.event.id, it.activity, it.probability) for it in found] == [(n, "AB"[n % 2], 0.75) for n in numbers]
