"""How long an event waits for its label at the real sizes of Qwen3-0.6B: one window of ten events at a time, guided, without reasoning,
behind the shared prefix in the cache; where the ten come at once, and where they come one by one, as in a home (see harkd/live.py), from
the last one on.

    python -m tools.bench_live FOLDER --data marble:PATH        (python -m tools.make_checkpoint FOLDER --like 0.6B --tokenizer ...)

The first window, which also computes the prefix, does not count. Prints wall and CPU seconds of a window: on a machine that others use too,
the CPU's over the threads are what an idle one would take at least. The last line is JSON with `ratios`: the median wall times over 4
seconds, `window_to_limit` of ten events at once, `last_event_to_limit` of the last of ten.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from harkd.doors import Parser, enter
from harkd.errors import UserError
from harkd.homes.dataset import read
from harkd.homes.events import Event
from harkd.live import Recognizer
from harkd.memory import peak_memory
from harkd.recognition import Machine

LIMIT = 4.0  # seconds


def run(argv: Sequence[str] | None) -> dict[str, Any]:
    """Measure, print, and return the ratios."""
    parser = Parser("tools.bench_live", "How long an event waits for its label.")
    parser.add_argument("model")
    parser.add_argument("--data", default="simulated", help="READER:PATH, of which it takes full windows")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    parser.at_least_one(args, "windows")

    data = read(args.data)
    full = islice((window.events for window in data.windows() if len(window.events) == 10), args.windows + 1)
    recognizer = Recognizer.load(args.model, None, data.homes[0], dtype=args.dtype, machine=Machine("cpu"))
    at_once, last, each = [], [], []  # (wall, CPU) seconds of ten events together, of the last of ten, and to prepare for one before it
    for events in full:
        at_once.append(_timed(lambda: _label(recognizer, events)))
        each += [_timed(lambda n=n: recognizer.prepare(events[:n])) for n in range(1, len(events))]
        last.append(_timed(lambda: _label(recognizer, events)))
    if len(last) < 2:
        raise UserError(f"{args.data} holds fewer than two windows of ten events: choose other data")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.data}, {len(last) - 1} windows")
    print(f"the first window, with the prefix: {at_once[0][0]:.2f} s")
    for name, of in (("ten events at once", at_once[1:]), ("the last of ten", last[1:]), ("prepared for one before", each[9:])):
        walls, cpus = zip(*of)
        print(f"{name}: median {statistics.median(walls):.2f} s, worst {max(walls):.2f} s; CPU median {statistics.median(cpus):.2f} s")
    print(f"peak resident memory: {peak_memory()['cpu'] / 1e9:.2f}e9 bytes")
    medians = {"window": at_once[1:], "last_event": last[1:]}
    return {"ratios": {f"{name}_to_limit": round(statistics.median(wall for wall, _ in of) / LIMIT, 3) for name, of in medians.items()}}


def _label(recognizer: Recognizer, events: Sequence[Event]) -> None:
    if not all(found.activity for found in recognizer.recognize(events)):
        raise RuntimeError("a guided answer lacks an activity")


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("tools.bench_live", run, argv)


if __name__ == "__main__":
    sys.exit(main())
