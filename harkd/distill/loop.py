"""The training loop.

    loss of a step = sum over its supervised tokens of -log p / their count,     over all packs of the step at once

so that the loss and its gradient do not depend on how the examples of a step are divided into packs. Any set of parameters can be trained:
an adapter's, or a whole model's.

A run is a function of its arguments: the order of examples comes from (seed, epoch), nothing else is random. `last.safetensors` holds all
that a step depends on, hence a run that was killed and called again ends, on a CPU with as many threads, with the very bits of one that
was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harkd.distill import checkpoint
from harkd.distill.examples import TrainingExample
from harkd.distill.optimiser import AdamW, learning_rate
from harkd.distill.packing import Batch, Pack, collate, plan
from harkd.errors import UserError
from harkd.files import write_text
from harkd.jsonl import JsonLinesWriter, read_json_lines
from harkd.qwen3.model import Qwen3

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LoopSettings:
    """How to train. The defaults are for LoRA; a whole model wants a tenth of the learning rate, and a weight decay such as 0.01."""

    lr: float = 2e-4  # at its peak
    epochs: int = 3
    batch_tokens: int = 8192  # in a pack, prefixes included
    packs_per_step: int = 1  # their gradients add up in the parameters' dtype: keep it at 1 for a whole bfloat16 model
    seed: int = 0  # of the order of examples
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 0  # validate every so many steps, besides at the end of every epoch
    save_every: int = 0  # write the last checkpoint every so many steps, besides at the end of every epoch

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_tokens", "packs_per_step", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.lr > 1:
            raise UserError(f"lr must be at most 1, not {self.lr}")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction must be between 0 and 1, not {self.warmup_fraction}")


@dataclass(frozen=True)
class Result:
    """How a run went. The model is left with the parameters of `best_step`, the step (from 1) with the lowest validation loss.

    Without validation examples the losses are None and the last step is the best. `start_loss`, before any step, is for comparison and
    never the best: it would hand back a model that learnt nothing. `step` is how far the run has got.
    """

    step: int = 0
    start_loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None


def train(
    model: Qwen3,
    parameters: Mapping[str, nn.Parameter],
    train_examples: Sequence[TrainingExample],
    validation_examples: Sequence[TrainingExample],
    settings: LoopSettings,
    folder: Path,
    *,
    vocab_size: int | None = None,
    log: Callable[[dict[str, Any]], None] = lambda record: None,
    on_best: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Train `parameters`, part of `model`, in place, and leave the best of them there. Continues from `folder`/last.safetensors if there.

    Args: vocab_size: the tokenizer's, where the model's is padded; log: called with each line of metrics; on_best: called whenever the
    parameters in place are the best so far.
    Raises UserError for a damaged checkpoint or one of another run, and where the loss is no longer a number.
    """
    # 1. The whole run is known beforehand: each step's epoch and packs
    schedule = [(epoch, packs) for epoch in range(settings.epochs) for packs in epoch_steps(train_examples, settings, epoch)]
    if not schedule:
        raise UserError("there is no example to train on")
    optimiser = AdamW(parameters, settings.weight_decay)

    # 2. Continue what was killed
    folder = Path(folder)
    digest = run_digest(settings, parameters, train_examples, validation_examples)
    result = _resume(folder, digest, parameters, optimiser)
    run = _Run(model, optimiser, validation_examples, settings, vocab_size, folder, digest, result, log, on_best)
    with _open_metrics(folder / METRICS, result.step) as run.metrics:
        if result.step == 0:
            run.result = replace(result, start_loss=run.validate(0))
        for step in range(result.step, len(schedule)):
            epoch, packs = schedule[step]
            began = time.perf_counter()

            # 3. Loss and gradient over all packs of the step
            optimiser.zero_grad()
            examples = [[train_examples[i] for i in pack] for pack in packs]
            loss, tokens, supervised = accumulate(model, examples, vocab_size)
            norm = optimiser.gradient_norm()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                windows = ", ".join(example.window for pack in examples for example in pack)
                raise run.diverged(f"in step {step + 1} the loss was {loss} and the gradient's norm {norm}, on the windows {windows}")

            # 4. A clipped update
            lr = learning_rate(step, len(schedule), settings.lr, settings.warmup_fraction)
            optimiser.step(lr, scale=min(1.0, settings.clip / norm) if norm else 1.0)

            # 5. Metrics
            run.result = replace(run.result, step=step + 1)
            seconds = time.perf_counter() - began
            run.report(step=step + 1, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, tokens=tokens, supervised=supervised, seconds=seconds)

            # 6. Validation, and checkpoints
            run.keep(epoch, epoch_ends=step + 1 == len(schedule) or schedule[step + 1][0] > epoch)

    # 7. The best parameters are the run's result
    run.restore_best()
    return run.result


def epoch_steps(examples: Sequence[TrainingExample], settings: LoopSettings, epoch: int) -> list[list[Pack]]:
    """The packs of each step of an epoch; the last step may have fewer."""
    packs, n = plan(examples, settings.batch_tokens, settings.seed, epoch), settings.packs_per_step
    return [packs[i : i + n] for i in range(0, len(packs), n)]


def check_examples(model: Qwen3, examples: Sequence[TrainingExample], batch_tokens: int) -> None:
    """Raise UserError where a model cannot be trained on these examples, so that it is known before anything is written."""
    positions, ids = model.config.max_position_embeddings, model.config.vocab_size
    if model.dtype == torch.float16:
        raise UserError("float16 cannot hold gradients as small as those of training: give --dtype bfloat16 or float32")
    for example in examples:
        tokens = example.prefix + example.ids
        if len(tokens) > positions:
            raise UserError(f"the example of window {example.window} has {len(tokens)} tokens, and the model {positions} positions")
        if max(tokens) >= ids:
            raise UserError(f"the tokenizer has the id {max(tokens)}, and the model {ids} ids: they do not belong together")
    plan(examples, batch_tokens, seed=0, epoch=0)  # raises where one is longer than a pack


def pack_loss(model: Qwen3, batch: Batch, vocab_size: int | None = None) -> Tensor:
    """The sum of -log p over the supervised tokens of one pack."""
    hidden = model.hidden(batch.ids, batch.positions, batch.sequences)  # [T, C]
    return model.nll(hidden[batch.rows], batch.targets, vocab_size).sum()


def accumulate(model: Qwen3, packs: Sequence[Sequence[TrainingExample]], vocab_size: int | None = None) -> tuple[float, int, int]:
    """Add the gradients of a step's loss to the parameters. Returns the loss, the tokens run over, and the supervised ones."""
    batches = [collate(pack, model.device) for pack in packs]
    supervised = sum(len(batch.targets) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = pack_loss(model, batch, vocab_size) / supervised
        part.backward()
        loss += part.item()
    return loss, sum(len(batch.ids) for batch in batches), supervised


@torch.no_grad()
def validation_loss(model: Qwen3, examples: Sequence[TrainingExample], batch_tokens: int, vocab_size: int | None = None) -> float:
    """The mean of -log p over all supervised tokens of `examples`."""
    total, supervised = 0.0, 0
    for pack in plan(examples, batch_tokens, seed=0, epoch=0):
        batch = collate([examples[i] for i in pack], model.device)
        total += pack_loss(model, batch, vocab_size).item()
        supervised += len(batch.targets)
    return total / supervised


def run_digest(
    settings: LoopSettings,
    parameters: Mapping[str, nn.Parameter],
    train_examples: Sequence[TrainingExample],
    validation_examples: Sequence[TrainingExample],
) -> str:
    """16 hex digits of all that a run depends on but the frozen weights: settings, shapes of the parameters, examples."""
    shapes = {name: [str(parameter.dtype), *parameter.shape] for name, parameter in parameters.items()}
    digest = hashlib.sha256(json.dumps([asdict(settings), shapes, len(train_examples)]).encode())
    for example in (*train_examples, *validation_examples):
        for values in ([len(example.prefix), len(example.ids)], example.prefix, example.ids, example.mask):
            digest.update(array("q", values).tobytes())
    return digest.hexdigest()[:16]


def _resume(folder: Path, digest: str, parameters: Mapping[str, nn.Parameter], optimiser: AdamW) -> Result:
    """Put the last checkpoint's parameters and optimiser state in place, where there is one. Returns how far it had got."""
    folder.mkdir(parents=True, exist_ok=True)
    last = checkpoint.load(folder, "last")
    if last is None:
        return Result()
    if last.facts.get("run") != digest:
        raise UserError(f"{last.path} belongs to a run with other settings or other examples: train into another folder or remove it")
    last.restore(parameters, optimiser)
    return Result(**{name: last.facts[name] for name in asdict(Result())})


def _open_metrics(path: Path, step: int) -> JsonLinesWriter:
    """The metrics up to `step`, to be continued: what a killed run wrote behind its last checkpoint goes, for it is computed again."""
    kept = [record for _, record in read_json_lines(path) if record["step"] <= step] if step and path.exists() else []
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return JsonLinesWriter(path)


@dataclass
class _Run:
    """What a run writes: metrics and checkpoints; and how far it is."""

    model: Qwen3
    optimiser: AdamW
    validation_examples: Sequence[TrainingExample]
    settings: LoopSettings
    vocab_size: int | None
    folder: Path
    digest: str
    result: Result
    log: Callable[[dict[str, Any]], None]
    on_best: Callable[[Result], None]
    metrics: JsonLinesWriter | None = None

    def report(self, **record: Any) -> None:
        self.metrics.append(record)
        self.log(record)

    def validate(self, epoch: int) -> float | None:
        if not self.validation_examples:
            return None
        loss = validation_loss(self.model, self.validation_examples, self.settings.batch_tokens, self.vocab_size)
        if not math.isfinite(loss):
            raise self.diverged(f"after step {self.result.step} the validation loss was {loss}")
        self.report(step=self.result.step, epoch=epoch, validation_loss=loss)
        return loss

    def keep(self, epoch: int, epoch_ends: bool) -> None:
        """Validate and write checkpoints where it is time: the last one behind everything that it implies."""
        step, settings, result = self.result.step, self.settings, self.result
        if epoch_ends or (self.validation_examples and settings.eval_every and step % settings.eval_every == 0):
            loss = self.validate(epoch)
            if loss is None or result.best_loss is None or loss < result.best_loss:
                self.result = replace(result, best_step=step, best_loss=loss)
                self._save("best", epoch)
                self.on_best(self.result)
        if epoch_ends or (settings.save_every and step % settings.save_every == 0):
            self._save("last", epoch)

    def _save(self, name: str, epoch: int) -> None:
        facts = {"run": self.digest, "torch": torch.__version__, "epoch": epoch, **asdict(self.result)}
        checkpoint.save(self.folder, name, self.optimiser.parameters, self.optimiser, facts)

    def restore_best(self) -> None:
        best = checkpoint.load(self.folder, "best")
        if best is None or best.facts.get("run") != self.digest:
            raise UserError(f"{self.folder} has lost its best checkpoint: remove last.safetensors there and train again")
        best.restore(self.optimiser.parameters)

    def diverged(self, what: str) -> UserError:
        saved = [path.name for path in (self.folder / "last.safetensors", self.folder / "best.safetensors") if path.exists()]
        kept = f"{' and '.join(saved)} in {self.folder} hold the state before" if saved else "no checkpoint had been written"
        return UserError(f"training diverged: {what}; {kept}; train again with a lower learning rate")
