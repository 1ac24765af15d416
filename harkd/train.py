"""Door 2: a student learns from a teacher's traces, and a LoRA adapter comes out.

    python -m harkd.train --model Qwen/Qwen3-0.6B --traces runs/traces --out runs/adapter
    python -m harkd.train                              (nano-student, on what harkd.generate left without arguments)

`--train-on reasoning` learns the teacher's reasoning and answer, `answer` its answer alone, `truth` the true labels of `--data --split`
without any teacher: the control that every distillation result needs, and the way to train a teacher on a data set. Killed and started
again, it goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harkd.doors import DEFAULT_RUNS, STUDENT, Parser, RunFolder, add_model_arguments, digests, enter, file_digest, read_json
from harkd.errors import UserError
from harkd.files import write_json
from harkd.homes.answer import ANSWER_FORM
from harkd.homes.dataset import ReadOptions, add_data_arguments, read, read_options
from harkd.homes.prompt import TEMPLATE_VERSION
from harkd.qwen3.config import PROJECTIONS

if TYPE_CHECKING:
    from harkd.distill.examples import TrainingExample
    from harkd.distill.loop import LoopSettings
    from harkd.qwen3.lora import LoraConfig
    from harkd.qwen3.tokenizer import Tokenizer

FILES = ("adapter_config.json", "adapter_model.safetensors", "harkd.json", "last.safetensors", "best.safetensors", "metrics.jsonl")
Grouped = TypeVar("Grouped")  # a trace or a window: it has a group


@dataclass(frozen=True)
class TrainSettings:
    """What to train on what. `traces` is a folder that generate wrote; with train_on "truth", `data` and `split` stand in for it."""

    model: str
    out: str
    traces: str | None = None
    train_on: str = "reasoning"
    keep: str = "correct"
    min_agreement: float = 1.0
    data: str | None = None
    split: str = "train"
    limit: int | None = None
    rules: bool = True
    options: ReadOptions = ReadOptions()
    lora_rank: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = PROJECTIONS
    lr: float = 2e-4
    epochs: int = 3
    batch_tokens: int = 8192
    validation: float = 0.1
    seed: int = 0
    dtype: str | None = None


def train(settings: TrainSettings, *, device: str | None = None, export: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Train an adapter into `settings.out`, continuing what is there; with `export`, also write the merged model as a Hugging Face folder.

    Returns steps, losses and counts of examples. Raises UserError for a mistake in the settings.
    """
    from harkd.distill.loop import LoopSettings
    from harkd.distill.traces import TRACES
    from harkd.qwen3.lora import LoraConfig

    _check(settings)
    lora = LoraConfig(settings.lora_rank, settings.lora_alpha, settings.target_modules)
    loop = LoopSettings(lr=settings.lr, epochs=settings.epochs, batch_tokens=settings.batch_tokens, seed=settings.seed, save_every=20)
    traces = Path(settings.traces or "")
    inputs = [traces / TRACES if traces.is_dir() else traces] if settings.traces is not None else []
    folder = RunFolder(settings.out, "train", asdict(settings), overwrite, FILES, digests([settings.model], files=inputs))
    result = folder.result
    if result is None:
        if export is not None:
            _check_export(Path(export), Path(settings.out))  # now, not after hours
        result = _train(settings, lora, loop, folder, device)
    if export is not None:
        result = {**result, "export": export_merged(settings.model, settings.out, Path(export), settings.dtype)}
    return result


def _check(settings: TrainSettings) -> None:
    """What can be said of the settings before anything is read."""
    if settings.train_on == "truth" and settings.data is None:
        raise UserError("--train-on truth learns from a data set: name it with --data READER:PATH")
    if settings.train_on != "truth" and settings.traces is None:
        raise UserError(f"--train-on {settings.train_on} learns from traces: name the folder that harkd.generate wrote with --traces")
    if settings.train_on == "truth" and settings.traces is not None:
        raise UserError("--train-on truth learns from --data: leave --traces out")
    if settings.train_on != "truth" and (settings.data is not None or settings.limit is not None):
        raise UserError(f"--train-on {settings.train_on} learns from --traces: leave --data and --limit out")
    if not 0 < settings.lora_alpha < float("inf"):
        raise UserError(f"--lora-alpha must be above 0, not {settings.lora_alpha}")
    if not 0 <= settings.validation < 1:
        raise UserError(f"--validation must be at least 0 and below 1, not {settings.validation}")
    if not 0 <= settings.min_agreement <= 1:
        raise UserError(f"--min-agreement must be between 0 and 1, not {settings.min_agreement}")


def _train(settings: TrainSettings, lora: LoraConfig, loop: LoopSettings, folder: RunFolder, device: str | None) -> dict[str, Any]:
    from harkd.distill.examples import preview
    from harkd.distill.loop import check_examples, epoch_steps
    from harkd.distill.loop import train as train_loop
    from harkd.qwen3.lora import add_lora, fingerprint, save_adapter
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.qwen3.weights import load_model

    tokenizer = load_tokenizer(settings.model)
    learn, validate, template = _examples(settings, tokenizer)
    print(f"{len(learn)} examples to train on, {len(validate)} to validate on; the first, as the student sees it:\n")
    print(f"{preview(learn[0], tokenizer)}\n")
    model = load_model(settings.model, device, settings.dtype)
    check_examples(model, [*learn, *validate], loop.batch_tokens)
    notes = {
        "base": settings.model, "base_fingerprint": fingerprint(model), "template": template, "thinking": settings.train_on == "reasoning",
        "answer_form": ANSWER_FORM, "train_on": settings.train_on,
    }  # fmt: skip
    parameters = add_lora(model, lora, settings.seed)
    folder.begin()
    with _Progress(sum(len(epoch_steps(learn, loop, epoch)) for epoch in range(settings.epochs))) as log:
        outcome = train_loop(model, parameters, learn, validate, loop, folder.path, vocab_size=tokenizer.vocab_size, log=log)
    save_adapter(folder.path, parameters, lora, settings.model, notes)
    result = {
        "out": settings.out, "examples": len(learn), "validation_examples": len(validate),
        "trained_parameters": sum(p.numel() for p in parameters.values()),
    }  # fmt: skip
    return folder.finish({**result, **asdict(outcome)}, {"tokens_per_epoch": sum(len(example.ids) for example in learn)})


def _examples(settings: TrainSettings, tokenizer: Tokenizer) -> tuple[list[TrainingExample], list[TrainingExample], str]:
    """Examples to train and to validate on, and the prompt template that they were written with. Raises UserError where there are none."""
    from harkd.distill.examples import examples_from_traces, examples_from_truth, template_of
    from harkd.distill.select import select, yield_table
    from harkd.distill.traces import read_traces
    from harkd.recognition import first_windows

    counts: Counter[str] = Counter()
    if settings.train_on == "truth":
        dataset = read(settings.data, settings.options)
        parts = hold_out(first_windows(dataset, settings.split, settings.limit), settings.validation, settings.seed)
        learn, validate = (examples_from_truth(dataset.homes, part, tokenizer, counts, rules=settings.rules) for part in parts)
        template = TEMPLATE_VERSION
    else:
        traces = list(read_traces(Path(settings.traces), counts))
        print(f"what --keep correct would keep of {len(traces)} traces, by --min-agreement:\n{yield_table(traces).text()}")
        selection = select(traces, settings.keep, settings.min_agreement)
        print(selection.summary)
        if not selection.kept:
            raise UserError(f"{settings.traces} holds no trace to learn from: {selection.summary}")
        template = template_of(selection.kept)
        parts = hold_out(selection.kept, settings.validation, settings.seed)
        learn, validate = (examples_from_traces(part, tokenizer, settings.train_on, counts) for part in parts)
    for cause, count in counts.items():
        print(f"{count} left out: {cause}")
    if not learn:
        causes = ", ".join(f"{count} {cause}" for cause, count in counts.items())
        raise UserError(f"there is no example to train on ({causes or 'all are held out for validation'})")
    return learn, validate, template


def hold_out(items: Iterable[Grouped], fraction: float, seed: int) -> tuple[list[Grouped], list[Grouped]]:
    """Divide windows or traces into those to train on and those held out: whole groups of recordings, drawn by seed and name.

    round(fraction x groups) are held out, at least one where there are two groups, none for fraction 0.
    """
    items = list(items)
    groups = sorted({item.group for item in items}, key=lambda group: hashlib.sha256(f"{seed}:validation:{group}".encode()).digest())
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction else 0
    held_out = set(groups[:count])
    return [item for item in items if item.group not in held_out], [item for item in items if item.group in held_out]


class _Progress:
    """A progress bar on stderr that shows the last losses: the loop's `log`."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm

        self.bar, self.shown = tqdm(total=steps, unit="step", file=sys.stderr), {}

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, record: dict[str, Any]) -> None:
        self.shown.update({name: f"{record[name]:.4f}" for name in ("loss", "validation_loss") if name in record})
        self.bar.set_postfix(self.shown)
        self.bar.update(record["step"] - self.bar.n)

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def export_merged(model: str, adapter: str, out: Path, dtype: str | None = None) -> str:
    """Merge an adapter into its base, in float32, and write a Hugging Face folder that transformers and vLLM load, whole or not at all.

    `harkd.json` there tells what was merged: the same export a second time finds that it is done. Raises UserError where the folder holds
    anything else.
    """
    from harkd.qwen3.hub import resolve
    from harkd.qwen3.lora import merge
    from harkd.qwen3.weights import load_model, save_model

    merged = {"base": model, "dtype": dtype, "adapter": adapter, "adapter_digest": file_digest(Path(adapter) / "adapter_model.safetensors")}
    if (out / "harkd.json").is_file() and read_json(out / "harkd.json") == merged:
        print(f"{out} is done", file=sys.stderr)
        return str(out)
    _check_export(out, Path(adapter))
    partial = _partial(out)
    save_model(merge(load_model(model, "cpu", dtype, adapter)), partial, resolve(model))
    write_json(partial / "harkd.json", merged)
    partial.replace(out.resolve())
    return str(out)


def _partial(out: Path) -> Path:
    """Where an export is written until it is whole."""
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def _check_export(export: Path, out: Path) -> None:
    """See that a folder can be written there when training is over."""
    if export.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{export} is the run's own folder or holds it: name another one with --export")
    if export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise UserError(f"{export} is not empty: name another folder with --export")
    try:
        shutil.rmtree(_partial(export), ignore_errors=True)  # of a killed run
        _partial(export).mkdir(parents=True)
        _partial(export).rmdir()
    except OSError as error:
        raise UserError(f"{export} cannot be written: {error.strerror}: name another folder with --export") from None


def _parser() -> Parser:
    default = TrainSettings("", "")
    parser = Parser("harkd.train", "A student learns from a teacher's traces, or from the truth; a LoRA adapter comes out.")
    parser.add_argument("--model", default=STUDENT, help="the student: a folder in Hugging Face's layout or a hub id")
    parser.add_argument("--traces", help=f"a folder that harkd.generate wrote; {DEFAULT_RUNS}/traces where none is named")
    parser.add_argument("--out", default=f"{DEFAULT_RUNS}/adapter", help="the run's folder, and the adapter's")
    parser.add_argument("--train-on", choices=["reasoning", "answer", "truth"], default=default.train_on, help="what is learnt")
    kept = "which traces: of at least --min-agreement, the best per window, all"
    parser.add_argument("--keep", choices=["correct", "best", "all"], default=default.keep, help=kept)
    agreement = "share of scored events that a correct trace answers right"
    parser.add_argument("--min-agreement", type=float, default=default.min_agreement, help=agreement)
    parser.add_argument("--data", help="with --train-on truth: READER:PATH")
    parser.add_argument("--split", default=default.split, help="with --train-on truth: train, validation, test or all")
    parser.add_argument("--limit", type=int, help="with --train-on truth: only the first so many windows")
    parser.add_switch("--rules", default.rules, "with --train-on truth: put the rules for ambiguous cases into the prompt")
    parser.add_argument("--lora-rank", type=int, default=default.lora_rank)
    parser.add_argument("--lora-alpha", type=float, default=default.lora_alpha)
    parser.add_argument("--target-modules", default=",".join(PROJECTIONS), help="projections that carry an adapter, with commas")
    parser.add_argument("--lr", type=float, default=default.lr, help="learning rate at its peak")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    step = "tokens in an optimiser step, the shared prefix counted once"
    parser.add_argument("--batch-tokens", type=int, default=default.batch_tokens, help=step)
    share = "share of the recordings' groups held out to choose the best checkpoint"
    parser.add_argument("--validation", type=float, default=default.validation, help=share)
    drawn = "of the adapter's first values, the order of examples and the held-out groups"
    parser.add_argument("--seed", type=int, default=default.seed, help=drawn)
    parser.add_argument("--export", metavar="DIR", help="also write base and adapter, merged, as a Hugging Face folder")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    add_data_arguments(parser)
    add_model_arguments(parser)
    return parser


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    args = parser.parse_args(argv)
    parser.at_least_one(args, "limit")
    if args.traces is None and args.train_on != "truth":
        args.traces = f"{DEFAULT_RUNS}/traces"
    names = (
        "model", "out", "traces", "train_on", "keep", "min_agreement", "data", "split", "limit", "rules", "lora_rank", "lora_alpha", "lr",
        "epochs", "batch_tokens", "validation", "seed", "dtype",
    )  # fmt: skip
    same = {name: getattr(args, name) for name in names}
    targets = tuple(name.strip() for name in args.target_modules.split(","))
    settings = TrainSettings(**same, options=read_options(args), target_modules=targets)
    return train(settings, device=args.device, export=args.export, overwrite=args.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("harkd.train", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
