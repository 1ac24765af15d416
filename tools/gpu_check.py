"""Checks and measures harkd on a CUDA machine, within nine minutes: correctness first, then device times beside baselines.

    python -m tools.gpu_check [--out DIR]               all parts, each with its share of the time
    python -m tools.gpu_check --only PART               kernels; generation (with transformers); training (and PEFT, and Liger if installed)

Needs no data: tensors are random, lists of lengths are written in the code. Where harkd is not installed, harkd/kernels becomes a link to
kernels. Times are medians over replays of a CUDA graph, so that launches do not count (where something cannot be captured
the table says "no graph"), with half the distance of the quartiles beside them. They stand beside the baselines' times and the physical
limit: the bytes over the copy bandwidth or the operations over the bfloat16 matrix rate, both measured here. Results go to tools/results/,
the last line is JSON with `ratios`: a baseline's time, or the limit, over ours. Exit code 0; 1 where something is wrong, failed, or was
skipped for lack of time (a missed target is none of these); 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch

from harkd.files import write_json
from tools.gpu_parts import PARTS, ROOT, every_part


@dataclass(frozen=True)
class Check:
    """`function(backend, *inputs)` gives tensors; the first `trained` inputs get gradients. "triton" is set against "torch" in float64."""

    name: str
    function: Callable
    inputs: list[torch.Tensor]
    trained: int


@dataclass(frozen=True)
class Bench:
    """Variants of ours against baselines that do the same work, `targets` being the least ratios to a baseline or to "limit".

    Each is a function that builds the function to measure, so that only one holds memory and a failure is its own.
    """

    name: str
    ours: dict[str, Callable[[], Callable]]
    baselines: dict[str, Callable[[], Callable]] = field(default_factory=dict)
    bytes: float = 0
    operations: float = 0  # two for each multiplication that is added up
    targets: dict[str, float] = field(default_factory=dict)
    peak: float = 0  # bytes that one call may take at most, where its memory is to be measured


@dataclass
class Record:
    """What was found; written to a file after each finding, so that a run cut short leaves what it has."""

    path: Path
    machine: dict
    checks: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # what ratios were taken from, where no row says it
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {key: value for key, value in vars(self).items() if key != "path"})

    def skip(self, name: str) -> None:
        self.skipped.append(name)
        print(f"skipped for lack of time: {name}", flush=True)
        self.save()

    def failed(self, name: str) -> None:
        self.wrong.append(f"{name}: {traceback.format_exc(limit=-3)}")
        print(f"FAILED {self.wrong[-1]}", flush=True)
        self.save()


def forward(function: Callable, *inputs: torch.Tensor) -> Callable[[], Callable]:
    """Builds: the function of these inputs, without gradients."""
    return lambda: torch.no_grad()(partial(function, *inputs))


def both(function: Callable, *inputs: torch.Tensor) -> Callable[[], Callable]:
    """Builds: the function of copies of the inputs, and the gradients of them all under one random upstream gradient."""

    def build() -> Callable:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        upstream = [torch.randn_like(x) for x in listed(function(*leaves))]
        return lambda: torch.autograd.grad(listed(function(*leaves)), leaves, upstream)

    return build


def listed(made: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [made] if isinstance(made, torch.Tensor) else list(made)


def device_time(function: Callable[[], object]) -> tuple[float, float, bool]:
    """Median and spread in ms of one call, and whether it ran as a graph; several calls a replay where one is short."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    once = _intervals(function, 3)[0]
    calls, graph = min(50, max(1, round(1 / max(once, 1e-3)))), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    except RuntimeError:  # the function waits for the device, or the like
        torch.cuda.synchronize()
        graph = None
    call, calls = (function, 1) if graph is None else (graph.replay, calls)
    call()
    times = [x / calls for x in _intervals(call, min(50, max(7, round(200 / max(once * calls, 1e-3)))))]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2, graph is not None


def _intervals(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call on the device, the least first."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)


def peak_bytes(function: Callable[[], object]) -> int:
    """Device memory that one call takes beyond what was held."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict:
    """GPU, versions, and the two rates that nothing here can beat: bytes per second of a copy, bfloat16 operations per second."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = device_time(lambda: target.copy_(source))[0]
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = device_time(lambda: left @ right)[0]
    names = {"gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__}
    installed = {str(found.metadata["Name"]).lower(): found.version for found in distributions()}
    names |= {package: installed.get(package) for package in ("triton", "liger-kernel", "peft")}
    return names | {"bytes_per_second": 2 * 2**30 / copy * 1e3, "operations_per_second": 2 * 8192**3 / product * 1e3}


def exactness(check: Check, dtype: torch.dtype) -> float:
    """The largest error of any result, where 1 is what is allowed: twice that of the reference in this dtype, and 0.1% of the signal.

    Infinite where a second run gives other bits, or a result is not a number.
    """

    def results(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).to(wide).requires_grad_(i < check.trained) for i, x in enumerate(check.inputs)]
        outputs = listed(check.function(backend, *inputs))
        random = torch.Generator(inputs[0].device).manual_seed(0)
        upstream = [torch.randn(x.shape, generator=random, device=x.device).to(dtype).to(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, inputs[: check.trained], upstream) if check.trained else []
        return [x.detach().double() for x in (*outputs, *gradients)]

    worst, mine = 0.0, results("triton", dtype)
    if not all(map(torch.equal, mine, results("triton", dtype))):  # the same bits on every run
        return float("inf")
    for ours, plain, truth in zip(mine, results("torch", dtype), results("torch", torch.float64), strict=True):
        signal, error, own = (float(x.square().mean().sqrt()) for x in (truth, ours - truth, plain - truth))
        allowed = 2 * own + 1e-3 * signal
        if not 0 < allowed < 0.1 * signal:
            raise ValueError(f"a result of zeros or one 10% too large would pass: signal {signal:.2e}, allowed {allowed:.2e}")
        worst = max(worst, error / allowed if error == error else float("inf"))
    return worst


def run_checks(record: Record, checks: Iterable[Check], dtypes: tuple[torch.dtype, ...], deadline: float) -> None:
    for check in checks:
        for dtype in dtypes:
            name = f"{check.name}, {str(dtype).removeprefix('torch.')}"
            if time.monotonic() > deadline:
                record.skip(name)
                continue
            try:
                record.checks[name] = round(exactness(check, dtype), 3)
            except Exception:  # counted, told and part of the exit code: the other findings of a rare machine must not be lost
                record.failed(name)
                continue
            if record.checks[name] > 1:
                record.wrong.append(f"{name}: error {record.checks[name]} x what is allowed")
            print(f"{'wrong' if record.checks[name] > 1 else 'right'}  {record.checks[name]:6.3f} of the allowed error  {name}", flush=True)
            record.save()


def run_benches(record: Record, benches: Iterable[Bench], timer: Callable, memory: Callable, deadline: float) -> None:
    print(f"{'ms':>9} {'+-':>7} {'ratio':>7} {'target':>7}  what", flush=True)
    for bench in benches:
        if time.monotonic() > deadline:
            record.skip(bench.name)
            continue
        rates = record.machine["bytes_per_second"], record.machine["operations_per_second"]
        limit, ours = 1e3 * max(bench.bytes / rates[0], bench.operations / rates[1]), {}
        for label, build in (bench.ours | bench.baselines).items():
            name = f"{bench.name}, {label}" if label else bench.name
            try:
                ms, spread, graph, peak = _measured(build(), timer, memory if bench.peak else lambda function: None)
            except Exception:  # as above
                record.failed(name)
                continue
            if label in bench.ours:
                ours[name], pairs = ms, {f"{name} / limit": limit / ms} if limit else {}
            else:
                pairs = {f"{own} / {label}": ms / time_of_ours for own, time_of_ours in ours.items()}
            record.rows.append({"name": name, "ms": ms, "spread": spread, "graph": graph, "peak_bytes": peak})
            notes = ("" if graph else "  no graph") + ("" if peak is None else f"  {peak / 1e9:.2f} GB")
            if label in bench.ours and peak is not None and peak > bench.peak:
                notes += f", above {bench.peak / 1e9:.2f}: MISSED"
            print(f"{ms:9.4f} {spread:7.4f} {'':15}  {name}{notes}", flush=True)
            for pair, ratio in pairs.items():
                target = bench.targets.get(pair.rpartition(" / ")[2], 0)
                told = f"{target:.2f}" if target else ""
                print(f"{'':17} {ratio:7.3f} {told:>7}  {pair}{'  MISSED' if ratio < target else ''}", flush=True)
            record.ratios |= {pair: round(ratio, 4) for pair, ratio in pairs.items()}
            record.save()


def _measured(function: Callable, timer: Callable, memory: Callable) -> tuple[float, float, bool, int | None]:
    return *timer(function), memory(function)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=PARTS, help="one part; all of them, one behind the other, without it")
    results = Path(os.environ.get("OUT") or ROOT / "tools" / "results")
    parser.add_argument("--out", type=Path, default=results, help="a folder; $OUT or tools/results where none is named")
    parser.add_argument("--seconds", type=float, default=450, help="no new measurement begins after that")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if not torch.cuda.is_available():
        print("This machine has no CUDA GPU that torch can use, so there is nothing to check here.", file=sys.stderr)
        return 2
    if find_spec("harkd.kernels") is None:
        (ROOT / "harkd" / "kernels").symlink_to("../kernels")  # as an installation would place it
        importlib.invalidate_caches()
    if args.only is None:
        return every_part(args.out.resolve(), deadline)
    torch.manual_seed(0)
    part, facts = importlib.import_module(f"tools.gpu_{args.only}"), machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{args.only} {facts['gpu']} torch {facts['torch']} triton {facts['triton']}".lower())
    record = Record(args.out.resolve() / f"{slug}.json", facts)
    print(json.dumps(facts), flush=True)
    if hasattr(part, "measure"):
        part.measure(record, deadline)
    else:
        half = deadline - args.seconds / 2
        runs = [partial(run_checks, record, part.checks(part.REAL), (dtype,), half) for dtype in part.REAL.dtypes]  # each compiles anew
        for run in (*runs, partial(run_benches, record, part.benches(part.REAL), device_time, peak_bytes, deadline)):
            try:
                run()
            except Exception:  # where the inputs themselves cannot be made; as above
                record.failed("inputs")
    record.save()
    print(json.dumps({**facts, "wrong": len(record.wrong), "skipped": len(record.skipped), "ratios": record.ratios}))
    return 1 if record.wrong or record.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
