"""What gpu_check measures of training: tools.bench_train on whole models of random weights, its ratios beside what is wanted of them.

Examples are windows of MARBLE where `../shared` holds them, else of a simulated home. `to_limit` counts products that are computed once:
recomputation is not among them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.gpu_check import Record

ROOT = Path(__file__).resolve().parents[1]
WHOLE = {  # arguments, and the least that is wanted of a ratio
    "0.6B": (["--layers", "28", "--windows", "64"], {"examples_to_peft": 2.2}),
    "8B": (["--layers", "36", "--windows", "32"], {"examples_to_peft": 1.6, "to_limit": 0.45}),
}
MOST = {"memory_to_peft": 0.5}


def measure(record: Record, deadline: float) -> None:
    """Run the benchmark for each size, as long as there is time."""
    there = (ROOT.parent / "shared/data/marble/dataset").is_dir() and (ROOT.parent / "shared/qwen3").is_dir()
    data = [] if there else ["--data", "simulated:D0", "--tokenizer", str(ROOT / "harkd/models/nano-student")]
    for size, (arguments, least) in WHOLE.items():
        command = [sys.executable, "-m", "tools.bench_train", "--device", "cuda", "--like", size, *arguments, *data]
        try:
            left = max(1.0, deadline - time.monotonic())
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=left)
            ratios = json.loads(done.stdout.splitlines()[-1])["ratios"]
        except subprocess.TimeoutExpired:
            record.wrong.append(f"{size}: no time left")
            continue
        except (IndexError, KeyError, ValueError):  # its own message stands on stderr
            record.wrong.append(f"{size}: no ratios, exit code {done.returncode}")
            continue
        if done.returncode:
            record.wrong.append(f"{size}: exit code {done.returncode}")
        print(f"{size}\n{done.stdout}", end="", flush=True)
        for name, ratio in ratios.items():
            missed = ratio < least.get(name, ratio) or ratio > MOST.get(name, ratio)
            print(f"{ratio:7.3f}  {size}, {name}{'  MISSED' if missed else ''}", flush=True)
        record.ratios |= {f"{size}, {name}": ratio for name, ratio in ratios.items()}
        record.save()
