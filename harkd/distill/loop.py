"""The training loop.

Each step runs over its packs, takes the loss of all of them at once (losses.py), clips the gradient and updates the parameters: an
adapter's, or a whole model's. Several processes share the packs of a step (harkd/distributed.py).

A run is a function of its arguments: the order of examples comes from (seed, epoch), what the student writes from (seed, step), nothing
else is random. `last.safetensors` holds all that a step depends on, hence a run that was killed and called again ends, on a CPU with as
many threads, with the very bits of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harkd.distill import checkpoint
from harkd.distill.examples import Examples, digest_into
from harkd.distill.losses import Objective, accumulate
from harkd.distill.optimiser import BETA2, AdamW, learning_rate
from harkd.distill.packing import Pack, plan
from harkd.distill.progress import METRICS, Progress, Result, open_metrics
from harkd.distributed import World
from harkd.errors import UserError
from harkd.qwen3.model import Qwen3

Rollout = Callable[[Examples, int], Examples]  # (examples, seed) -> the same, written by the student


@dataclass(frozen=True)
class LoopSettings:
    """How to train. The defaults are for LoRA; a whole model wants a tenth of the learning rate, and a weight decay such as 0.01.

    From random weights, `beta2` 0.95: gradients of the first steps are large, and 0.999 would hold later steps small on their account.
    """

    lr: float = 2e-4  # at its peak
    epochs: int = 3
    batch_tokens: int = 8192  # in a pack, prefixes included
    packs_per_step: int = 1  # of all processes; gradients add up in the parameters' dtype: keep it at 1 for a whole bfloat16 model
    seed: int = 0  # of the order of examples
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    beta2: float = BETA2  # how long the optimiser remembers the size of gradients
    clip: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 0  # validate every so many steps, besides at the end of every epoch
    f1_every: int = 0  # the same for the validation by F1
    save_every: int = 0  # write the last checkpoint every so many steps, besides at the end of every epoch
    patience: int = 0  # stop after so many validations without a better one, by F1 where there is one, else by loss; 0: never

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_tokens", "packs_per_step", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.lr > 1:
            raise UserError(f"lr must be at most 1, not {self.lr}")
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 must be at least 0 and below 1, not {self.beta2}")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction must be between 0 and 1, not {self.warmup_fraction}")


def train(
    model: Qwen3, parameters: Mapping[str, nn.Parameter], train_examples: Examples, validation_examples: Examples,
    settings: LoopSettings, folder: Path, *, objective: Objective = Objective(), world: World = World(), rollout: Rollout | None = None,
    f1: Callable[[], float] | None = None, log: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Result:  # fmt: skip
    """Train `parameters`, part of `model`, in place, and leave the best of them there. Continues from `folder`/last.safetensors if there.

    Args: objective: what is learnt; world: the processes that share the work; rollout: has the student write the examples of a step that
    is learnt on-policy; f1: the F1 of the parameters in place; log: called with each line of metrics.
    Raises UserError for a checkpoint of another run or two damaged ones, and where the loss is no longer a number or explodes.
    """
    # 1. The whole run is known beforehand: each step's epoch and packs
    if not train_examples:
        raise UserError("there is no example to train on")
    schedule = [(epoch, packs) for epoch in range(settings.epochs) for packs in epoch_steps(train_examples, settings, epoch)]

    # 2. Continue what was killed
    folder, optimiser = Path(folder), AdamW(parameters, settings.weight_decay, settings.beta2)
    digest = run_digest(settings, objective, parameters, train_examples, validation_examples)
    result = _resume(folder, digest, parameters, optimiser, world)
    run = Progress(model, optimiser, validation_examples, settings, objective, world, folder, digest, result, f1, log)
    with open_metrics(folder / METRICS, result.step, world) as run.metrics:
        run.result = result if result.step else replace(result, start_loss=run.validate(0))
        for step in range(result.step, len(schedule)):
            if settings.patience and run.result.waited >= settings.patience:
                break
            (epoch, packs), began = schedule[step], time.perf_counter()

            # 3. Loss and gradient over all packs of the step
            optimiser.zero_grad()
            on_policy = objective.is_on_policy(step, settings.seed)
            examples = [[train_examples[i] for i in pack] for pack in world.share(packs)]
            examples = _written(examples, rollout, settings, step * world.size + world.rank) if on_policy else examples
            found = accumulate(model, examples, objective, world, on_policy=on_policy)
            norm = optimiser.gradient_norm()
            if not (found.loss <= objective.bound(model) and math.isfinite(norm)):
                windows = ", ".join(train_examples[i].window for pack in packs for i in pack)
                raise run.diverged(f"in step {step + 1} the loss was {found.loss} and the gradient's norm {norm}, on the windows {windows}")

            # 4. A clipped update
            lr = learning_rate(step, len(schedule), settings.lr, settings.warmup_fraction)
            optimiser.step(lr, scale=min(1.0, settings.clip / norm) if norm else 1.0)

            # 5. Metrics, validation and checkpoints
            run.result = replace(run.result, step=step + 1)
            run.report_step(epoch, found, lr, norm, time.perf_counter() - began)
            run.keep(epoch, epoch_ends=step + 1 == len(schedule) or schedule[step + 1][0] > epoch)

    # 6. The best parameters are the run's result
    run.restore_best()
    return run.result


def _written(packs: Sequence[Examples], rollout: Rollout, settings: LoopSettings, place: int) -> list[Examples]:
    """The examples of a step as the student writes them now, in packs anew, for their lengths have changed."""
    examples = [example for pack in packs for example in pack]
    if not examples:  # of the last step, where processes outnumber its packs
        return []
    written = rollout(examples, int(hashlib.sha256(f"{settings.seed} {place}".encode()).hexdigest()[:7], 16))
    return [[written[i] for i in pack] for pack in plan(written, settings.batch_tokens, seed=0, epoch=0)]


def epoch_steps(examples: Examples, settings: LoopSettings, epoch: int) -> list[list[Pack]]:
    """The packs of each step of an epoch; the last step may have fewer."""
    packs, n = plan(examples, settings.batch_tokens, settings.seed, epoch), settings.packs_per_step
    return [packs[i : i + n] for i in range(0, len(packs), n)]


def check_examples(model: Qwen3, examples: Examples, batch_tokens: int) -> None:
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


def run_digest(
    settings: LoopSettings, objective: Objective, parameters: Mapping[str, nn.Parameter], train: Examples, validation: Examples
) -> str:
    """16 hex digits of all that a run depends on but the frozen weights: settings, objective, shapes of the parameters, examples."""
    shapes = {name: [str(parameter.dtype), *parameter.shape] for name, parameter in parameters.items()}
    digest = hashlib.sha256(json.dumps([asdict(settings), objective.facts(), shapes, len(train)]).encode())
    digest_into(digest, (*train, *validation))
    return digest.hexdigest()[:16]


def _resume(folder: Path, digest: str, parameters: Mapping[str, nn.Parameter], optimiser: AdamW, world: World) -> Result:
    """Put the last checkpoint's parameters and optimiser state in place, where there is one. Returns how far it had got."""
    if world.sum([int(digest[:8], 16)]) != [int(digest[:8], 16) * world.size]:
        raise UserError("the processes of this run differ in their settings, examples or models: start all of them with the same")
    folder.mkdir(parents=True, exist_ok=True)
    last = checkpoint.load_last(folder)
    if last is None:
        return Result()
    if last.facts.get("run") != digest:
        raise UserError(f"{last.path} belongs to a run with other settings or other examples: train into another folder or remove it")
    last.restore(parameters, optimiser)
    return Result(**{name: last.facts[name] for name in asdict(Result())})
