"""What the three doors share: flags, run folders, costs, and how a mistake of the user's ends.

A run folder holds `settings.json` (what was asked, written first), the door's own files, `cost.json` and, last, `result.json`: the JSON object that the door prints as its
last line. Run again with the same settings, a door goes on where it stopped, or says that it is done; with other settings it asks for --overwrite.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harkd.errors import UserError
from harkd.files import write_json


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are a UserError: one sentence."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")

    def add_switch(self, name: str, default: bool | None, text: str) -> None:
        """--name and --no-name."""
        self.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)

    def demand(self, args: argparse.Namespace, *names: str) -> None:
        """Raise UserError where one of the flags was not given."""
        absent = [f"--{name}" for name in names if getattr(args, name) is None]
        if absent:
            self.error(f"{' and '.join(absent)} must be given: no model is embedded yet, so that the doors have no defaults of their own")

    def at_least_one(self, args: argparse.Namespace, *names: str) -> None:
        """Raise UserError where one of the flags is below 1."""
        for name in names:
            if getattr(args, name) is not None and getattr(args, name) < 1:
                self.error(f"--{name} must be at least 1")


def enter(prog: str, run: Callable[[Sequence[str] | None], dict[str, Any]], argv: Sequence[str] | None) -> int:
    """Run a door: its result is printed as one line of JSON and 0 returned; a user's mistake is printed as one sentence and 2 returned."""
    try:
        print(json.dumps(run(argv), ensure_ascii=False))
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def add_model_arguments(parser: Parser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; CUDA where there is a GPU")
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float16", "float32", "float64"], help="of the weights; as they are stored")


def add_sampling_arguments(parser: Parser) -> None:
    """The flags of Sampling, and --batch. None stands for Qwen3's recommended value."""
    group = parser.add_argument_group("sampling (by default what Qwen3 recommends with and without reasoning)")
    group.add_argument("--temperature", type=float, help="0 is greedy; recommended 0.6 with reasoning, 0.7 without")
    group.add_argument("--top-p", type=float, help="recommended 0.95 with reasoning, 0.8 without")
    group.add_argument("--top-k", type=int, help="0 is off; recommended 20")
    group.add_argument("--min-p", type=float, help="recommended 0")
    group.add_argument("--presence-penalty", type=float, help="0 to 2 against endless repetition")
    group.add_argument("--max-new-tokens", type=int, help="4096 with reasoning, 1024 without")
    group.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    group.add_argument("--batch", type=int, default=16, help="completions written at once")
    group.add_argument("--cache-tokens", type=int, default=65536, help="room of the key/value cache")


def sampling_of(args: argparse.Namespace, thinking: bool):
    """The Sampling that the flags ask for in this mode; warns of greedy reasoning, which Qwen3 answers with endless repetition."""
    from harkd.sampling.sampler import recommended

    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "max_new_tokens", "seed")
    sampling = replace(recommended(thinking), **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if thinking and sampling.temperature == 0:
        print("warning: greedy decoding with reasoning tends to repeat itself without end in Qwen3; it recommends --temperature 0.6", file=sys.stderr)
    return sampling


def checked_device(name: str | None) -> str | None:
    """`name`, if torch has such a device. Raises UserError otherwise."""
    import torch

    try:
        if name is not None:
            torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


class RunFolder:
    """The folder of one run of a door. `result` holds the stored result where the run is done already."""

    def __init__(self, path: str | Path, settings: dict[str, Any], overwrite: bool, files: Sequence[str]) -> None:
        """Open or create the folder. `files`: names of what the door writes there, which --overwrite removes, and nothing else."""
        self.path = Path(path)
        own = ("settings.json", "cost.json", "result.json", *files)
        settings = json.loads(json.dumps(settings))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, and --out names a folder")
        if overwrite:
            self._remove(own)
        if (self.path / "settings.json").exists():
            self._compare(settings)
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and no run of harkd's: name another folder with --out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "settings.json", settings)
        self.result = _read_json(self.path / "result.json") if (self.path / "result.json").exists() else None
        self.started = time.perf_counter()
        if self.result is not None:
            print(f"{self.path} is done; --overwrite runs it again", file=sys.stderr)

    def _compare(self, settings: dict[str, Any]) -> None:
        stored = _read_json(self.path / "settings.json")
        differing = sorted(name for name in settings.keys() | stored.keys() if settings.get(name) != stored.get(name))
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.path} holds a run with other settings ({name}: {stored.get(name)!r}, now {settings.get(name)!r}): name another folder with --out, or start anew with --overwrite"
            )

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def finish(self, result: dict[str, Any], costs: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write cost.json and, last, result.json."""
        seconds = time.perf_counter() - self.started
        write_json(self.path / "cost.json", {"seconds": round(seconds, 3), "peak_memory_bytes": peak_memory(), **(costs or {})})
        write_json(self.path / "result.json", result)
        return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process, and of its GPU where it used one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak
