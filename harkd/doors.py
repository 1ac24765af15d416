"""What the three doors share: flags, run folders, costs, and how a mistake of the user's ends.

A run folder holds `.lock` (of the process at work there), `settings.json` (what was asked), the door's own files, `cost.json` (what the
last process took) and, written last, `result.json`: the JSON object that the door prints as its last line. Run again with the same
settings, a door goes on where it stopped, or says that it is done; with other settings it asks for --overwrite.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from harkd.errors import UserError
from harkd.files import hold, read_json, write_json
from harkd.homes.dataset import content_digest
from harkd.homes.prompt import TEMPLATE_VERSION
from harkd.memory import peak_memory
from harkd.qwen3.config import DTYPES
from harkd.recognition import Guiding, Machine
from harkd.sampling.request import BATCH, Sampling, recommended

DEFAULT_RUNS = "runs/default"  # what the doors read and write where they are told nothing,
TEACHER, STUDENT, SIMULATED, TRANSFER = "nano-teacher", "nano-student", "simulated", "simulated:T0"  # with what ships with the package


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are a UserError: one sentence."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        """As argparse does, and see that every whole number is one that 32 bits hold."""
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            if isinstance(value, int) and abs(value) >= 1 << 31:
                self.error(f"--{name.replace('_', '-')} must lie between {1 - (1 << 31)} and {(1 << 31) - 1}, not {value}")
        return parsed

    def add_switch(self, name: str, default: bool | None, text: str) -> None:
        """--name and --no-name."""
        self.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)

    def at_least_one(self, args: argparse.Namespace, *names: str) -> None:
        """Raise UserError where one of the flags is below 1."""
        for name in names:
            if getattr(args, name) is not None and getattr(args, name) < 1:
                self.error(f"--{name.replace('_', '-')} must be at least 1")


def enter(prog: str, run: Callable[[Sequence[str] | None], dict[str, Any]], argv: Sequence[str] | None) -> int:
    """Run a door: its result is printed as one line of JSON and 0 returned; a user's mistake is printed as one sentence and 2 returned."""
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes of torchrun, which alone speaks on stdout
    try:
        with nullcontext() if first else redirect_stdout(sys.stderr):
            print(json.dumps(run(argv)))
    except UserError as error:
        print(f"{prog}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if "--overwrite" in (sys.argv if argv is None else argv) else "the same command"
        print(f"{prog}: interrupted; {same} goes on from what is on the disk", file=sys.stderr)
        return 130
    return 0


def add_model_arguments(parser: Parser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; CUDA where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; as they are stored")


def add_sampling_arguments(parser: Parser, guided: bool = True) -> None:
    """The flags of Sampling, of Guiding unless `guided` is False, and of Machine. None stands for Qwen3's recommended value."""
    group = parser.add_argument_group("sampling (by default what Qwen3 recommends with and without reasoning)")
    group.add_argument("--temperature", type=float, help="0 is greedy; recommended 0.6 with reasoning, 0.7 without")
    group.add_argument("--top-p", type=float, help="recommended 0.95 with reasoning, 0.8 without")
    group.add_argument("--top-k", type=int, help="0 is off; recommended 20")
    group.add_argument("--min-p", type=float, help="recommended 0")
    group.add_argument("--presence-penalty", type=float, help="0 to 2 against endless repetition")
    group.add_argument("--max-new-tokens", type=int, help="4096 with reasoning, 1024 without")
    group.add_argument("--max-thinking", type=int, help="close the reasoning after so many tokens and go to the answer")
    group.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    if guided:
        group.add_argument("--guided", action="store_true", help="choose the labels alone: the answer's form is given, and never malformed")
        group.add_argument("--exact-probabilities", action="store_true", help="with --guided: of every label, even where some begin alike")
    group.add_argument("--batch", type=int, default=BATCH, help="completions written at once")
    group.add_argument("--cache-tokens", type=int, help="room of the key/value cache; what the free memory allows")


def sampling_of(args: argparse.Namespace, thinking: bool) -> Sampling:
    """The Sampling that the flags ask for in this mode; warns of greedy reasoning, which Qwen3 answers with endless repetition."""
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "max_new_tokens", "max_thinking", "seed")
    sampling = replace(recommended(thinking), **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if thinking and sampling.temperature == 0:
        warning = "greedy decoding with reasoning tends to repeat itself without end in Qwen3; it recommends --temperature 0.6"
        print(f"warning: {warning}", file=sys.stderr)
    return sampling


def guiding_of(args: argparse.Namespace) -> Guiding:
    """What --guided and --exact-probabilities ask for. Raises UserError for the second without the first."""
    if args.exact_probabilities and not args.guided:
        raise UserError("--exact-probabilities are those of guided answers: give --guided too")
    return Guiding(args.guided, args.exact_probabilities)


def machine_of(args: argparse.Namespace) -> Machine:
    return Machine(args.device, args.batch, args.cache_tokens, getattr(args, "tensor_parallel", 1))


class RunFolder:
    """The folder of one run of a door. `result` holds the stored result where the run is done already.

    Nothing is written or removed before `begin`, so that a mistake in the settings costs no older run.
    """

    def __init__(
        self, path: str | Path, door: str, settings: dict[str, Any], overwrite: bool, files: Sequence[str], inputs: Mapping[str, str | None]
    ) -> None:
        """Look at the folder.

        `settings`: what must be the same when a run is continued, but for `out`, the folder itself; `files`: patterns of what the door
        writes there, which --overwrite removes, and nothing else; `inputs`: the digests of what it reads, part of the settings.
        """
        overwrite = overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # started again by torchrun, it goes on
        self.path, self.overwrite, self.files = Path(path), overwrite, ("result.json", "cost.json", *files)
        asked = {name: value for name, value in settings.items() if name != "out"}  # a folder may be moved, or named with a slash
        self.settings = json.loads(json.dumps({"door": door, "template": TEMPLATE_VERSION, **asked, "inputs": inputs}))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, and --out names a folder")
        if (self.path / "settings.json").exists():
            self._compare()
        elif self.path.exists() and any(not file.name.startswith(".") for file in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and no run of harkd's: name another folder with --out")
        self.result = read_json(self.path / "result.json") if (self.path / "result.json").exists() and not overwrite else None
        self.started = time.perf_counter()
        if self.result is not None:
            print(f"{self.path} is done; --overwrite runs it again", file=sys.stderr)

    def _compare(self) -> None:
        stored, now = (dict(_flat(settings)) for settings in (read_json(self.path / "settings.json"), self.settings))
        if stored.get("door") != now["door"]:
            raise UserError(f"{self.path} holds a run of another door ({stored.get('door')}): name another folder with --out")
        differing = [name for name in {**now, **stored} if now.get(name) != stored.get(name)]
        if differing and not self.overwrite:
            name = differing[0]
            what = f"{self.path} holds a run with other settings ({name}: {stored.get(name)!r}, now {now.get(name)!r})"
            raise UserError(f"{what}: name another folder with --out, or start anew with --overwrite")

    def begin(self) -> None:
        """Make the folder, with --overwrite without the files of the run before, and write settings.json.

        Called when all that can be wrong has been looked at. No other process can begin there before `finish`, or the end of this one.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path)  # this process may begin again behind an error
            if (self.path / "settings.json").exists():
                self._compare()  # another process may have come and gone since
            for pattern in (*self.files, ".*.tmp") if self.overwrite else (".*.tmp",):  # those: what a killed run was writing
                for file in self.path.glob(pattern):
                    file.unlink()
            write_json(self.path / "settings.json", self.settings)
        except OSError as error:
            raise UserError(f"{error.filename or self.path} cannot be written: {error.strerror}") from None

    def finish(self, result: dict[str, Any], costs: dict[str, Any] | None = None, complete: bool = True) -> dict[str, Any]:
        """Write cost.json and, last, result.json; not that where the run is to go on another time."""
        seconds = time.perf_counter() - self.started
        write_json(self.path / "cost.json", {"seconds": round(seconds, 3), "peak_memory_bytes": peak_memory(), **(costs or {})})
        if complete:
            write_json(self.path / "result.json", result)
        os.close(self._lock)
        return result


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that lies in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
    for key, inner in items or ():
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def digests(bases: Iterable[str], adapters: Iterable[str | None] = (), files: Iterable[Path] = (), data: Iterable[str | None] = ()) -> dict:
    """Digests, by place on this machine, of all that a run reads and that may be replaced under its name."""
    from harkd.qwen3.hub import ADAPTER_FILES, resolve

    adapted = [resolve(adapter, ADAPTER_FILES) / "adapter_model.safetensors" for adapter in adapters if adapter is not None]
    found = {str(folder): _model_digest(folder) for folder in dict.fromkeys(map(resolve, bases))}
    read = {name: digest for name in data if name is not None and (digest := content_digest(name)) is not None}
    return found | read | {str(file): file_digest(file) for file in (*adapted, *files)}


def _model_digest(folder: Path) -> str:
    """16 hex digits of a model's config, tokenizer and tensors, 4 KiB of each: reading 61 GiB anew at each start would take minutes."""
    from harkd.qwen3.weights import stored_tensors

    digest = hashlib.sha256(json.dumps([file_digest(folder / name) for name in ("config.json", "tokenizer.json")]).encode())
    for name, tensor in sorted(stored_tensors(folder).items()):
        with open(tensor.path, "rb") as file:
            file.seek(tensor.begin)
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + file.read(min(tensor.size, 4096)))
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str | None:
    """16 hex digits of a file's content, None where there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
