"""What gpu_check measures of training: tools.bench_train on models of random weights, its ratios beside what is wanted of them.

Examples are windows of MARBLE where `../shared` holds them, else of a simulated home. `to_limit` counts products that are computed once:
recomputation is not among them. 8B's shapes are cut to twelve layers: weights and time of all 36 would not fit into the minutes there are.
"""

from __future__ import annotations

import json
import signal
import sys
import time

from tools.gpu_check import Record
from tools.gpu_parts import ROOT, follow

WHOLE = {  # arguments, and the least that is wanted of a ratio
    "0.6B": (["--layers", "28", "--windows", "128"], {"examples_to_peft": 2.2}),
    "8B": (["--layers", "12", "--windows", "64"], {"examples_to_peft": 1.6, "to_limit": 0.45}),
}
MOST = {"memory_to_peft": 0.5}


def measure(record: Record, deadline: float) -> None:
    """Run the benchmark for each size, as long as there is time; what a contestant took is saved when it has ended."""
    for n, size in enumerate(WHOLE):
        _measure(record, size, (deadline - time.monotonic()) / (len(WHOLE) - n))
        record.save()


def _measure(record: Record, size: str, seconds: float) -> None:
    there = (ROOT.parent / "shared/data/marble/dataset").is_dir() and (ROOT.parent / "shared/qwen3").is_dir()
    data = [] if there else ["--data", "simulated:D0", "--tokenizer", str(ROOT / "harkd/models/nano-student")]
    arguments, least = WHOLE[size]
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        print(f"{size}  {line}", flush=True)
        if "  examples_per_s " in line:
            name, *facts = line.split()
            record.rows.append({"name": f"{size}, {name}", **dict(zip(facts[::2], map(float, facts[1::2])))})
        record.save()

    command = [sys.executable, "-m", "tools.bench_train", "--device", "cuda", "--like", size, *arguments, *data]
    code = follow(command, seconds, tell) if seconds > 1 else -signal.SIGKILL
    if code == -signal.SIGKILL:
        record.skip(size)
        return
    try:
        ratios = json.loads(lines[-1])["ratios"]
    except (IndexError, KeyError, ValueError):  # its own message stands on stderr
        record.wrong.append(f"{size}: no ratios, exit code {code}")
        return
    if code:
        record.wrong.append(f"{size}: exit code {code}")
    for name, ratio in ratios.items():
        missed = ratio < least.get(name, ratio) or ratio > MOST.get(name, ratio)
        print(f"{ratio:7.3f}  {size}, {name}{'  MISSED' if missed else ''}", flush=True)
    record.ratios |= {f"{size}, {name}": ratio for name, ratio in ratios.items()}
