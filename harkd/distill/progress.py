"""What a training run writes as it goes: lines of metrics, and checkpoints of the last step and of the best by each validation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harkd.distill import checkpoint
from harkd.distill.examples import Examples
from harkd.distill.losses import Objective, Step, validation_loss
from harkd.distill.optimiser import AdamW
from harkd.distributed import World
from harkd.errors import UserError
from harkd.files import write_text
from harkd.jsonl import JsonLinesWriter, read_json_lines
from harkd.memory import peak_memory
from harkd.qwen3.model import Qwen3

if TYPE_CHECKING:
    from harkd.distill.loop import LoopSettings

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Result:
    """How a run went. The model is left with the parameters of the best step (from 1): of `best_f1_step`, the highest validation F1, where
    that was asked for, else of `best_step`, the lowest validation loss.

    Without validation examples the losses are None and the last step is the best. `start_loss`, before any step, is for comparison and
    never the best: it would hand back a model that learnt nothing. `step` is how far the run has got, `waited` how many validations
    in a row were not better.
    """

    step: int = 0
    start_loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    best_f1_step: int = 0
    best_f1: float | None = None
    waited: int = 0


def open_metrics(path: Path, step: int, world: World) -> AbstractContextManager[JsonLinesWriter | None]:
    """The metrics up to `step`, to be continued: what a killed run wrote behind its last checkpoint goes, for it is computed again."""
    if world.rank:
        return nullcontext()
    kept = [record for _, record in read_json_lines(path) if record["step"] <= step] if step and path.exists() else []
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return JsonLinesWriter(path)


@dataclass
class Progress:
    """How far a run is, and the writing of it, which the first process does."""

    model: Qwen3
    optimiser: AdamW
    validation_examples: Examples
    settings: LoopSettings
    objective: Objective
    world: World
    folder: Path
    digest: str
    result: Result
    f1: Callable[[], float] | None
    log: Callable[[dict[str, Any]], None]
    metrics: JsonLinesWriter | None = None

    def report(self, **record: Any) -> None:
        if self.metrics is not None:
            self.metrics.append({"step": self.result.step, **record})
            self.log({"step": self.result.step, **record})

    def report_step(self, epoch: int, found: Step, lr: float, norm: float, seconds: float) -> None:
        """The line of metrics of a step."""
        memory = peak_memory()
        self.report(
            epoch=epoch, loss=found.loss, ways=found.ways, lr=lr, grad_norm=norm, tokens=found.tokens, supervised=found.supervised,
            seconds=seconds, tokens_per_second=found.tokens / seconds, memory_bytes=memory.get("cuda", memory["cpu"]),
        )  # fmt: skip

    def validate(self, epoch: int) -> float | None:
        """The validation loss, None where there are no examples to validate on."""
        if not self.validation_examples:
            return None
        loss = validation_loss(self.model, self.validation_examples, self.settings.batch_tokens, self.objective, self.world)
        if not math.isfinite(loss):
            raise self.diverged(f"after step {self.result.step} the validation loss was {loss}")
        self.report(epoch=epoch, validation_loss=loss)
        return loss

    def keep(self, epoch: int, epoch_ends: bool) -> None:
        """Validate and write checkpoints where it is time: the last one behind everything that it implies."""
        step, settings = self.result.step, self.settings
        if epoch_ends or (self.validation_examples and settings.eval_every and step % settings.eval_every == 0):
            loss, best = self.validate(epoch), self.result.best_loss
            self._judge(loss is None or best is None or loss < best, epoch, self.f1 is None, "best", best_step=step, best_loss=loss)
        if self.f1 is not None and (epoch_ends or (settings.f1_every and step % settings.f1_every == 0)):
            (f1,) = self.world.sum([self.f1() if self.world.rank == 0 else 0.0])
            self.report(epoch=epoch, validation_f1=f1)
            best = self.result.best_f1
            self._judge(best is None or f1 > best, epoch, True, "best-f1", best_f1_step=step, best_f1=f1)
        if epoch_ends or (settings.save_every and step % settings.save_every == 0):
            self._save("last", epoch)

    def _judge(self, better: bool, epoch: int, decides: bool, name: str, **best: Any) -> None:
        """Keep the parameters in place where they are the best; `decides`: the run's result is chosen by this validation."""
        if decides:
            self.result = replace(self.result, waited=0 if better else self.result.waited + 1)
        if better:
            self.result = replace(self.result, **best)
            self._save(name, epoch)

    def _save(self, name: str, epoch: int) -> None:
        facts = {"run": self.digest, "torch": torch.__version__, "epoch": epoch, **asdict(self.result)}
        if self.world.rank == 0:
            checkpoint.save(self.folder, name, self.optimiser.parameters, self.optimiser if name == "last" else None, facts)

    def restore_best(self) -> None:
        """Put the run's result in place."""
        self.world.sum([0.0])  # the first process has written it
        best = checkpoint.load(self.folder, "best" if self.f1 is None else "best-f1")
        if best is None or best.facts.get("run") != self.digest:
            raise UserError(f"{self.folder} has lost its best checkpoint: remove last.safetensors there and train again")
        best.restore(self.optimiser.parameters)

    def diverged(self, what: str) -> UserError:
        saved = [path.name for path in (self.folder / "last.safetensors", self.folder / "best.safetensors") if path.exists()]
        kept = f"{' and '.join(saved)} in {self.folder} hold the state before" if saved else "no checkpoint had been written"
        return UserError(f"training diverged: {what}; {kept}; train again with a lower learning rate")
