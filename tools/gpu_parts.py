"""The parts of gpu_check, one behind the other, each in a process of its own, which an error of the device, or a hang, ends alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"kernels": 0.4, "generation": 0.35, "training": 0.25}  # tools.gpu_PART, with checks() and benches(), or measure(): share of time
GRACE = 20  # seconds behind its time after which a part is killed


def follow(command: Sequence[str], seconds: float, tell: Callable[[str], None]) -> int:
    """Run a command and tell each of its lines as it comes; its whole group is killed when the seconds are over. Its exit code."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=os.setpgrp)
    timer = Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        for line in process.stdout:
            tell(line.rstrip("\n"))
        return process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def every_part(out: Path, deadline: float) -> int:
    """Run them all until the deadline, a time of `time.monotonic`. Prints the ratios of all; returns the exit code."""
    ratios, codes, lines = {}, {}, [""]

    def tell(line: str) -> None:
        lines[0] = line
        print(line, flush=True)

    for n, (part, share) in enumerate(PARTS.items()):
        seconds = (deadline - time.monotonic()) * share / sum(list(PARTS.values())[n:])
        command = [sys.executable, "-m", "tools.gpu_check", "--only", part, "--out", str(out), "--seconds", f"{seconds:.0f}"]
        codes[part] = follow(command, seconds + GRACE, tell)
        with suppress(ValueError, KeyError, TypeError):  # its last line is something else where it was killed
            ratios |= json.loads(lines[0])["ratios"]
    print(json.dumps({"exit_codes": codes, "ratios": ratios}))
    return int(any(codes.values()))
