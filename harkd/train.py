"""Door 2: a student learns from a teacher's traces, and a LoRA adapter comes out.

    python -m harkd.train --model Qwen/Qwen3-0.6B --traces runs/traces --out runs/adapter
    python -m harkd.train                              (nano-student, on what harkd.generate left without arguments)

`--train-on reasoning` learns the teacher's reasoning and answer, `answer` its answer alone, `truth` the true labels of `--data --split`
without any teacher: the control that every distillation result needs, and the way to train a teacher on a data set. `--learn` says how:
from the tokens alone, from the teacher's probabilities of the labels, from a teacher that reads along, or from text of the student's own
that a teacher scores (distill/losses.py). Killed and started again, it goes on from its last checkpoint; `torchrun --nproc-per-node N -m
harkd.train ...` trains on N GPUs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harkd.doors import DEFAULT_RUNS, STUDENT, Parser, RunFolder, add_model_arguments, digests, enter
from harkd.errors import UserError
from harkd.export import check_export, export_merged
from harkd.homes.answer import ANSWER_FORM
from harkd.homes.dataset import add_data_arguments, read_options
from harkd.lessons import TrainSettings, lessons
from harkd.qwen3.config import PROJECTIONS, read_config
from harkd.sampling.request import recommended

if TYPE_CHECKING:
    from tqdm import tqdm

    from harkd.distill.losses import Objective
    from harkd.distill.loop import LoopSettings
    from harkd.distributed import World
    from harkd.qwen3.lora import LoraConfig
    from harkd.qwen3.tokenizer import Tokenizer

TENSORS = ("adapter_model", "last", "previous", "best*", "teacher")
FILES = ("adapter_config.json", "harkd.json", "metrics.jsonl", *(f"{name}.safetensors" for name in TENSORS))
# what is not asked for; the models that ship know less to begin with, are small enough for a large adapter, and learn from so few traces
# that the best of a dozen held out are found behind the first epoch
USUAL = {"lora_rank": 16, "lora_alpha": 32.0, "epochs": 3, "batch_tokens": 8192, "validation": 0.1}
NANO = {"lora_rank": 64, "lora_alpha": 64.0, "epochs": 8, "batch_tokens": 4096, "validation": 0.0}


def train(
    settings: TrainSettings, *, device: str | None = None, export: str | None = None, overwrite: bool = False,
    checkpoint_activations: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train an adapter into `settings.out`, continuing what is there; with `export`, also write the merged model as a Hugging Face folder.

    `checkpoint_activations`: see Qwen3. Returns steps, losses and counts of examples. Raises UserError for a mistake in the settings.
    """
    from harkd.distill.loop import LoopSettings
    from harkd.distill.traces import TRACES
    from harkd.distributed import join
    from harkd.qwen3.hub import EMBEDDED, resolve
    from harkd.qwen3.lora import LoraConfig

    usual = NANO if settings.model in EMBEDDED else USUAL
    settings = replace(settings, **{name: value for name, value in usual.items() if getattr(settings, name) is None})
    settings.check()
    if settings.lr is None:
        settings = replace(settings, lr=0.2 / read_config(resolve(settings.model)).hidden_size)
    lora = LoraConfig(settings.lora_rank, settings.lora_alpha, settings.target_modules)
    same = {name: getattr(settings, name) for name in ("lr", "epochs", "batch_tokens", "packs_per_step", "seed", "patience")}
    loop = LoopSettings(**same, save_every=20, f1_every=settings.validate_f1)
    traces = Path(settings.traces or "")
    inputs = [traces / TRACES if traces.is_dir() else traces] if settings.traces is not None else []
    models = [settings.model] if settings.teacher is None else [settings.model, settings.teacher]
    folder = RunFolder(settings.out, "train", asdict(settings), overwrite, FILES, digests(models, files=inputs, data=[settings.data]))
    result = folder.result
    first = int(os.environ.get("RANK", "0")) == 0
    if result is None:
        if export is not None and first:
            check_export(Path(export), Path(settings.out))  # now, not after hours
        with join(device) as world:
            result = _train(settings, lora, loop, folder, world, checkpoint_activations)
    if export is not None and first:
        result = {**result, "export": export_merged(settings.model, settings.out, Path(export), settings.dtype)}
    return result


def _train(
    settings: TrainSettings, lora: LoraConfig, loop: LoopSettings, folder: RunFolder, world: World, checkpoint_activations: bool
) -> dict[str, Any]:
    from tqdm import tqdm

    from harkd.distill.examples import preview
    from harkd.distill.loop import check_examples, epoch_steps
    from harkd.distill.loop import train as train_loop
    from harkd.distill.teacher import with_top_k
    from harkd.practice import f1, rollout, room
    from harkd.qwen3.lora import add_lora, fingerprint, save_adapter
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.qwen3.weights import load_model

    if loop.packs_per_step < world.size:
        raise UserError(f"{world.size} processes share the packs of a step: give --packs-per-step {world.size} or a multiple of it")
    tokenizer = load_tokenizer(settings.model)
    found = lessons(settings, tokenizer)
    learn, validate = found.learn, found.validate
    print(f"{len(learn)} examples to train on, {len(validate)} to validate on; the first, as the student sees it:\n")
    print(f"{preview(learn[0], tokenizer)}\n")
    model = load_model(settings.model, world.device, settings.dtype)
    every = [*learn, *validate, *found.asked]
    check_examples(model, every, loop.batch_tokens)
    longest = min(loop.batch_tokens, model.config.max_position_embeddings)  # that an example can be
    usual, most = recommended(settings.thinking), room(every, longest)
    sampling = replace(usual, max_new_tokens=min(settings.max_new_tokens or usual.max_new_tokens, most), seed=settings.seed)
    objective = _objective(settings, tokenizer, longest)
    teacher = lambda: load_model(settings.teacher, world.device, settings.dtype).requires_grad_(False)  # noqa: E731
    if objective.needs_teacher and settings.teacher_top_k is None:
        objective = replace(objective, teacher=teacher())
    notes = {
        "base": settings.model, "base_fingerprint": fingerprint(model), "thinking": settings.thinking,
        "answer_form": ANSWER_FORM, "train_on": settings.train_on, "learn": settings.learn, **found.notes,
    }  # fmt: skip
    parameters = add_lora(model, lora, settings.seed)
    model.checkpoint_activations = checkpoint_activations
    callables = {
        "rollout": rollout(model, tokenizer, replace(sampling, temperature=1.0, top_k=0, top_p=1.0)),  # the student's own distribution
        "f1": f1(model, tokenizer, found.asked, found.truth, sampling) if settings.validate_f1 else None,
    }
    if world.rank == 0:
        folder.begin()
    if settings.teacher_top_k is not None:
        how = (settings.teacher_top_k, loop.batch_tokens, objective.temperature, tokenizer.vocab_size, teacher, world)
        taught = with_top_k([*learn, *validate], folder.path / "teacher.safetensors", *how)
        learn, validate = taught[: len(learn)], taught[len(learn) :]
    steps = sum(len(epoch_steps(learn, loop, epoch)) for epoch in range(settings.epochs))
    with tqdm(total=steps, unit="step", file=sys.stderr, disable=world.rank > 0) as bar:
        callables["log"] = _shown(bar)
        outcome = train_loop(model, parameters, learn, validate, loop, folder.path, objective=objective, world=world, **callables)
    result = {
        "out": settings.out, "examples": len(learn), "validation_examples": len(validate), "yield": found.by_class,
        "trained_parameters": sum(p.numel() for p in parameters.values()), **asdict(outcome),
    }  # fmt: skip
    if world.rank:
        return result
    save_adapter(folder.path, parameters, lora, settings.model, notes)
    return folder.finish(result, {"tokens_per_epoch": sum(len(example.ids) for example in learn)})


def _objective(settings: TrainSettings, tokenizer: Tokenizer, positions: int) -> Objective:
    """What is learnt, without the teacher itself. Raises UserError where that cannot read what the student reads."""
    from harkd.distill.losses import Objective
    from harkd.qwen3.hub import resolve
    from harkd.qwen3.tokenizer import load_tokenizer

    if settings.teacher is not None:
        if load_tokenizer(settings.teacher).vocabulary != tokenizer.vocabulary:
            what = f"the teacher {settings.teacher} and the student {settings.model} have different tokenizers"
            raise UserError(f"{what}, so their logits cannot be compared: leave logits and on-policy out of --learn")
        config, ids = read_config(resolve(settings.teacher)), tokenizer.vocab_size
        if config.vocab_size < ids or config.max_position_embeddings < positions:
            has = f"the teacher {settings.teacher} has {config.vocab_size} ids and {config.max_position_embeddings} positions"
            raise UserError(f"{has}, and an example may need {ids} and {positions}: name another, or lower --batch-tokens")
    return Objective(*settings.ways(), settings.divergence, settings.beta, settings.teacher_temperature, vocab_size=tokenizer.vocab_size)


def _shown(bar: tqdm) -> Callable[[dict[str, Any]], None]:
    """The loop's `log`: the bar shows the last losses."""
    shown: dict[str, str] = {}

    def log(record: dict[str, Any]) -> None:
        shown.update({name: f"{record[name]:.4f}" for name in ("loss", "validation_loss", "validation_f1") if name in record})
        bar.set_postfix(shown)
        bar.update(record["step"] - bar.n)

    return log


def _parser() -> Parser:
    parser = Parser("harkd.train", "A student learns from a teacher's traces, or from the truth; a LoRA adapter comes out.")
    parser.add_argument("--model", default=STUDENT, help="the student: a folder in Hugging Face's layout or a hub id")
    parser.add_argument("--traces", help=f"a folder that harkd.generate wrote; {DEFAULT_RUNS}/traces where none is named")
    parser.add_argument("--out", default=f"{DEFAULT_RUNS}/adapter", help="the run's folder, and the adapter's")
    parser.add_argument("--train-on", choices=["reasoning", "answer", "truth"], help="what is learnt")
    kept = "which traces: that agree with the truth or with the other samples of their window, the best per window, all"
    parser.add_argument("--keep", choices=["correct", "consistent", "best", "all"], help=kept)
    parser.add_argument("--min-agreement", type=float, help="share of events at which a correct or consistent trace must agree")
    parser.add_argument("--cap", type=int, help="traces of a class from which on others of the same classes are left out")
    parser.add_argument("--data", help="with --train-on truth: READER:PATH")
    parser.add_argument("--split", help="with --train-on truth: train, validation, test or all")
    parser.add_argument("--limit", type=int, help="with --train-on truth: only the first so many windows")
    parser.add_switch("--rules", True, "with --train-on truth: put the rules for ambiguous cases into the prompt")
    parser.add_argument("--learn", help="sequence, labels, logits, on-policy: several with commas, each with =WEIGHT where it is not 1")
    parser.add_argument("--teacher", help="the model that reads along, for logits and on-policy")
    parser.add_argument("--teacher-top-k", type=int, help="for logits: store the teacher's so many likeliest tokens once")
    parser.add_argument("--divergence", choices=["forward_kl", "reverse_kl", "jsd"], help="from the teacher's logits")
    parser.add_argument("--beta", type=float, help="the teacher's share of the middle, of jsd")
    parser.add_argument("--teacher-temperature", type=float, help="of both, with logits")
    parser.add_argument("--on-policy-fraction", type=float, help="with on-policy: share of the steps in which the student writes")
    told = lambda name: f"{USUAL[name]}, or {NANO[name]} for the models that ship"  # noqa: E731
    parser.add_argument("--lora-rank", type=int, help=told("lora_rank"))
    parser.add_argument("--lora-alpha", type=float, help=told("lora_alpha"))
    parser.add_argument("--target-modules", default=",".join(PROJECTIONS), help="projections that carry an adapter, with commas")
    parser.add_argument("--lr", type=float, help="learning rate at its peak; 0.2 / the model's width where none is given, 2e-4 at 0.6B")
    parser.add_argument("--epochs", type=int, help=told("epochs"))
    parser.add_argument("--batch-tokens", type=int, help=f"tokens in a pack, the shared prefix counted once: {told('batch_tokens')}")
    parser.add_argument("--packs-per-step", type=int, help="packs in a step, of all processes together")
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory: compute each layer twice")
    held_out = f"share of the recordings' groups held out to choose the best checkpoint: {told('validation')}"
    parser.add_argument("--validation", type=float, help=held_out)
    parser.add_argument("--validate-f1", type=int, metavar="N", help="validate by F1 too, every N steps and epoch, and let it choose")
    parser.add_argument("--patience", type=int, help="stop after so many validations in a row without a better")
    parser.add_argument("--max-new-tokens", type=int, help="that the student may write in training; as in generation")
    parser.add_argument("--seed", type=int, help="of the adapter, the examples' order and the held-out groups")
    parser.add_argument("--export", metavar="DIR", help="also write base and adapter, merged, as a Hugging Face folder")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    add_data_arguments(parser)
    add_model_arguments(parser)
    own = {"model", "out", "target_modules", "options"}
    parser.set_defaults(**{field.name: field.default for field in fields(TrainSettings) if field.name not in own})
    return parser


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    args = parser.parse_args(argv)
    parser.at_least_one(args, "limit", "cap", "max_new_tokens", "teacher_top_k")
    if args.traces is None and args.train_on != "truth":
        args.traces = f"{DEFAULT_RUNS}/traces"
    same = {field.name: getattr(args, field.name) for field in fields(TrainSettings) if hasattr(args, field.name)}
    targets = tuple(map(str.strip, args.target_modules.split(",")))
    settings = TrainSettings(**{**same, "options": read_options(args), "target_modules": targets})
    how = {"device": args.device, "export": args.export, "overwrite": args.overwrite}
    return train(settings, **how, checkpoint_activations=args.checkpoint_activations)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("harkd.train", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
