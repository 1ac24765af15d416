"""Many examples in one run of the model, their shared prefix computed once, nothing padded.

    pack        = [prefix A | a1 | a2 | prefix B | b1 | ...]       an example sees its prefix and itself
    positions     0..P-1     P..     P..  0..Q-1    Q..            they restart behind the prefix
    loss        = sum over supervised tokens t of -log p(ids[t] | what t sees)

It is exact: loss and gradients are those of every example behind its own copy of the prefix. This file is the one place where labels are
shifted: the hidden row of token t - 1 predicts token t. An example's first own token, which the prefix's last row would predict, is prompt
and so never supervised. A choice (see examples.py) of K tokens makes K predictions of one row, each with its probability as weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from random import Random

import torch
from torch import Tensor

from harkd.distill.examples import TrainingExample
from harkd.errors import UserError
from harkd.kernels.attention import Sequences
from harkd.qwen3.tokenizer import Example

Pack = list[int]  # indices of examples


@dataclass(frozen=True)
class Batch:
    """One pack as tensors: T tokens, N of them predicted; M tokens that are possible at `choices` choices."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    sequences: Sequences
    rows: Tensor  # [N] int64: hidden row rows[n] predicts targets[n]
    targets: Tensor  # [N] int64
    choices: int
    choice_rows: Tensor  # [M] int64: what hidden row choice_rows[m] predicts is choice_targets[m] with probability choice_weights[m]
    choice_targets: Tensor  # [M] int64
    choice_weights: Tensor  # [M] float64
    choice_entropy: float  # of all choices together, in nats
    top: tuple[Tensor, Tensor] | None  # [N, K]: ids int32 and logprobs of a teacher, where the examples have them


@contextmanager
def memory_for(batch: Batch, instead: str) -> Iterator[None]:
    """Raise a UserError that tells what to do instead where a GPU has no memory for what the block does with a pack."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"no memory for {len(batch.ids)} tokens: {instead}") from None


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Lay out examples in one pack, those of one prefix behind it.

    ValueError if an example has no supervised token, or supervises its first.
    """
    by_prefix: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        by_prefix.setdefault(tuple(example.prefix), []).append(example)
    ids, positions, rows, targets, lengths, prefix_of, prefix_len, prefix_start = ([] for _ in range(8))  # of int
    choices: list[tuple[int, int, float]] = []  # row, target, probability
    top: list[tuple[Tensor, Tensor]] = []
    for prefix, members in by_prefix.items():
        shared = len(prefix_len) if prefix else -1
        if prefix:
            prefix_len.append(len(prefix))
            prefix_start.append(len(ids))
            lengths.append(len(prefix))
            prefix_of.append(-1)
            ids += prefix
            positions += range(len(prefix))
        for example in members:
            supervised = _supervised(example)
            rows += [len(ids) + t - 1 for t in supervised]
            targets += [example.ids[t] for t in supervised]
            top += [example.top] if getattr(example, "top", None) else []
            for choice in getattr(example, "choices", ()):
                choices += [(len(ids) + choice.at - 1, *pair) for pair in zip(choice.ids, choice.probabilities, strict=True)]
            lengths.append(len(example.ids))
            prefix_of.append(shared)
            ids += example.ids
            positions += range(len(prefix), len(prefix) + len(example.ids))
    sequences = Sequences.packed(lengths, prefix_of, prefix_len, prefix_start, device)
    choice_rows, choice_targets, weights = zip(*choices, strict=True) if choices else ((), (), ())
    ids_, positions_, rows_, targets_, choice_rows_, choice_targets_ = (
        torch.tensor(values, dtype=torch.int64, device=device) for values in (ids, positions, rows, targets, choice_rows, choice_targets)
    )
    entropy = -sum(p * log(p) for p in weights)
    weights_ = torch.tensor(weights, dtype=torch.float64, device=device)
    top_ = tuple(torch.cat(part).to(device) for part in zip(*top, strict=True)) if top else None
    chosen = (len(set(choice_rows)), choice_rows_, choice_targets_, weights_, entropy)
    return Batch(ids_, positions_, sequences, rows_, targets_, *chosen, top_)


def _supervised(example: Example) -> list[int]:
    """Which own tokens are targets."""
    supervised = [t for t, learnt in enumerate(example.mask) if learnt]
    if not supervised or supervised[0] == 0:
        raise ValueError("an example has no supervised token, or supervises its first token, which only the shared prefix could predict")
    return supervised


def plan(examples: Sequence[TrainingExample], batch_tokens: int, seed: int, epoch: int) -> list[Pack]:
    """Divide examples into packs of at most `batch_tokens` tokens, prefixes included: a function of the arguments alone.

    Examples are shuffled, then put prefix by prefix into one pack after the other, since every further prefix in a pack costs its length;
    then the packs are shuffled, so that homes take turns. Every example is in exactly one pack. Raises UserError where an example alone is
    too long.
    """
    for example in examples:
        if (size := len(example.prefix) + len(example.ids)) > batch_tokens:
            what = f"the example of window {example.window} has {size} tokens"
            raise UserError(f"{what}: raise --batch-tokens (now {batch_tokens}) or leave the window out")
    random = Random(f"{seed} {epoch}")
    order = list(range(len(examples)))
    random.shuffle(order)
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for index in order:
        by_prefix.setdefault(tuple(examples[index].prefix), []).append(index)
    packs: list[Pack] = []
    room = 0
    for prefix, members in by_prefix.items():
        has_prefix = False
        for index in members:
            own = len(examples[index].ids)
            if own + (0 if has_prefix else len(prefix)) > room:
                packs.append([])
                room, has_prefix = batch_tokens, False
            packs[-1].append(index)
            room -= own + (0 if has_prefix else len(prefix))
            has_prefix = True
    random.shuffle(packs)
    return packs
