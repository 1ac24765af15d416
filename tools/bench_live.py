"""How long an event waits for its label at the real sizes of Qwen3-0.6B: one window of ten events at a time, guided, without reasoning,
behind the shared prefix in the cache.

    python -m tools.bench_live FOLDER --data marble:PATH        (python -m tools.make_checkpoint FOLDER --like 0.6B --tokenizer ...)

The first window, which also computes the prefix, does not count. Prints wall and CPU seconds of a window: on a machine that others use too,
the CPU's over the threads are what an idle one would take at least. The last line is JSON with `ratios`: `window_to_limit` is the median
wall time over 4 seconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from harkd.doors import Parser, enter
from harkd.errors import UserError
from harkd.homes.dataset import read
from harkd.memory import peak_memory
from harkd.recognition import Machine
from harkd.recognize import Recognizer

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
    walls, cpus = [], []
    for events in full:
        wall, cpu = time.perf_counter(), time.process_time()
        assert all(found.activity for found in recognizer.recognize(events))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    if len(walls) < 2:
        raise UserError(f"{args.data} holds fewer than two windows of ten events: choose other data")
    median, cpu = statistics.median(walls[1:]), statistics.median(cpus[1:])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.data}")
    print(f"the first window, with the prefix: {walls[0]:.2f} s")
    print(f"a window: median {median:.2f} s, worst {max(walls[1:]):.2f} s; CPU median {cpu:.2f} s; {len(walls) - 1} windows")
    print(f"peak resident memory: {peak_memory()['cpu'] / 1e9:.2f}e9 bytes")
    return {"ratios": {"window_to_limit": round(median / LIMIT, 3)}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("tools.bench_live", run, argv)


if __name__ == "__main__":
    sys.exit(main())
