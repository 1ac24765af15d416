"""What training needs of generation, which it is handed as callables: text that the student writes now, and its F1 on held-out windows.

Both write with a Generator of their own each time, since the prefixes that an older one holds were computed with older weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from harkd.errors import UserError
from harkd.recognition import read_answer
from harkd.sampling.request import BATCH, Request, Sampling
from harkd.scoring.metrics import score

if TYPE_CHECKING:
    from harkd.distill.examples import TrainingExample
    from harkd.lessons import Truth
    from harkd.qwen3.model import Qwen3
    from harkd.qwen3.tokenizer import Tokenizer
    from harkd.sampling.generator import Completion


def _write(model: Qwen3, tokenizer: Tokenizer, examples: Sequence[TrainingExample], sampling: Sampling) -> list[Completion]:
    """A completion of each example's prompt, in their order."""
    from harkd.sampling.generator import PAGE, Generator

    requests = [
        Request(e.window, tokenizer.decode(e.ids[: e.mask.index(True)]), tokenizer.decode(e.prefix), number, sampling)
        for number, e in enumerate(examples)
    ]
    most = 65536  # tokens, where so many are of use
    own = sorted((e.mask.index(True) + sampling.max_new_tokens + PAGE for e in examples), reverse=True)
    tokens = min(most, sum(own[:BATCH]) + sum(len(prefix) + PAGE for prefix in {tuple(e.prefix) for e in examples}))
    return sorted(Generator(model, tokenizer, BATCH, tokens).generate(requests), key=lambda done: done.request.sample)


def rollout(model: Qwen3, tokenizer: Tokenizer, sampling: Sampling) -> Callable[[Sequence[TrainingExample], int], list[TrainingExample]]:
    """(examples, seed) -> the same prompts, each with what the student writes to it now, all of it supervised."""

    def written(examples: Sequence[TrainingExample], seed: int) -> list[TrainingExample]:
        made = []
        for example, done in zip(examples, _write(model, tokenizer, examples, replace(sampling, seed=seed)), strict=True):
            own = done.ids + ([tokenizer.stop_ids[0]] if done.finish_reason == "stop" else [])
            first = example.mask.index(True)
            made.append(replace(example, ids=example.ids[:first] + own, mask=[False] * first + [True] * len(own), choices=(), top=None))
        return made

    return written


def room(examples: Sequence[TrainingExample], batch_tokens: int) -> int:
    """How many tokens a student may write so that every example still fits into a pack."""
    return batch_tokens - max(len(example.prefix) + example.mask.index(True) for example in examples)


def f1(model: Qwen3, tokenizer: Tokenizer, examples: Sequence[TrainingExample], truth: Truth, sampling: Sampling) -> Callable[[], float]:
    """The weighted F1 of what the student answers now to the windows of `examples`, one of each.

    UserError where no event has one true label: others are not scored.
    """
    if not any(len(labels) == 1 for example in examples for labels in truth[example.window][1]):
        raise UserError("--validate-f1 needs held-out windows with events of one true label: raise --validation or leave it out")

    def scored() -> float:
        right: list[Sequence[str]] = []
        answered: list[str | None] = []
        for done in _write(model, tokenizer, examples, sampling):
            offered, labels = truth[done.request.window]
            answered += read_answer(done.text, done.finish_reason, len(labels), offered).labels
            right += labels
        offered = dict.fromkeys(label for example in examples for label in truth[example.window][0])
        return score(right, answered, list(offered)).weighted_f1

    return scored
