"""The ways to learn from a teacher: what each adds up over a pack, and a step's loss from them.

    sequence    sum_n -log Q_n(t_n)                               over the supervised tokens t_n of what the teacher wrote
    labels      sum_c sum_k P_c(k) (log P_c(k) - log Q_c(k))      over the choices c of labels' tokens, P_c stored with the trace
    logits      sum_n D(P_n, Q_n)                                 over the same tokens, P_n by a teacher that reads along, or its stored
                                                                  top-k; D, its beta and temperature: kernels/divergence.py
    on-policy   sum_n KL(Q_n || P_n)                              over tokens that the student itself wrote, P_n as above

    loss of a step = sum over ways of weight * (sum over all packs and processes) / (count of its n or c over all of them)

so that the loss and its gradient do not depend on how the examples of a step are divided. Q is the student's distribution over the whole
vocabulary, at a choice too: what it gives to tokens of no label counts against it. All but `sequence` are zero where Q = P. A share of the
steps is learnt on-policy, the others by the other ways, as in GKD (arXiv 2306.13649); reverse KL there: MiniLLM, arXiv 2306.08543.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from harkd.distill.examples import Examples
from harkd.distill.packing import Batch, collate, memory_for, plan
from harkd.distributed import World
from harkd.errors import UserError
from harkd.kernels.divergence import KINDS, divergence, divergence_to_top_k
from harkd.qwen3.lora import fingerprint
from harkd.qwen3.model import Qwen3

WAYS = ("sequence", "labels", "logits")
SEQUENCE, ON_POLICY = (("sequence", 1.0),), (("on-policy", 1.0),)


@dataclass(frozen=True)
class Objective:
    """What is learnt: the ways with their weights, and the share of steps that is learnt on-policy instead."""

    ways: tuple[tuple[str, float], ...] = SEQUENCE
    on_policy_fraction: float = 0.0
    divergence: str = "forward_kl"  # of `logits`
    beta: float = 0.5
    temperature: float = 1.0
    teacher: Qwen3 | None = None
    vocab_size: int | None = None  # the tokenizer's, where the models' are padded

    def __post_init__(self) -> None:
        wrong = [name for name, weight in self.ways if name not in WAYS or not 0 < weight < math.inf]
        if wrong or not self.ways or len(dict(self.ways)) < len(self.ways):
            given = ",".join(f"{name}={weight}" for name, weight in self.ways)
            raise UserError(f"the ways to learn are {', '.join(WAYS)}, each once and with a weight above 0, not {given or 'none'}")
        if self.divergence not in KINDS or not 0 <= self.beta <= 1 or not 0 < self.temperature < math.inf:
            what = f"divergence {self.divergence}, beta {self.beta}, temperature {self.temperature}"
            raise UserError(f"{what}: the divergence is one of {', '.join(KINDS)}, beta 0 to 1, the temperature above 0")
        if not 0 <= self.on_policy_fraction <= 1:
            raise UserError(f"the on-policy fraction must be between 0 and 1, not {self.on_policy_fraction}")

    @property
    def needs_teacher(self) -> bool:
        return self.on_policy_fraction > 0 or "logits" in dict(self.ways)

    def is_on_policy(self, step: int, seed: int) -> bool:
        """Whether the student writes in this step: evenly spread over the steps, from a seeded start."""
        start, share = Random(f"{seed} on-policy").random(), self.on_policy_fraction
        return math.floor(start + (step + 1) * share) > math.floor(start + step * share)

    def bound(self, model: Qwen3) -> float:
        """Above this loss, four times that of a uniform guess, training has exploded."""
        weight = max(1.0, sum(dict(self.ways).values())) * max(1.0, self.temperature) ** 2
        return 4 * weight * math.log(self.vocab_size or model.config.vocab_size)

    def facts(self) -> list:
        """What a run depends on, for its digest."""
        settings = [self.on_policy_fraction, self.divergence, self.beta, self.temperature, self.vocab_size]
        return [list(map(list, self.ways)), *settings, self.teacher and fingerprint(self.teacher)]


def pack_losses(model: Qwen3, batch: Batch, objective: Objective, ways: Sequence[str]) -> dict[str, Tensor]:
    """The sum that each way makes of one pack."""
    place, vocab_size = (batch.ids, batch.positions, batch.sequences), objective.vocab_size
    hidden = model.hidden(*place)  # [T, C]
    sums = {}
    for way in ways:
        if way == "labels":
            nll = model.nll(hidden[batch.choice_rows], batch.choice_targets, vocab_size)  # [M]
            sums[way] = (nll * batch.choice_weights.to(nll.dtype)).sum() - batch.choice_entropy
        elif way == "sequence":
            sums[way] = model.nll(hidden[batch.rows], batch.targets, vocab_size).sum()
        else:
            how = ("reverse_kl", 0.5, 1.0) if way == "on-policy" else (objective.divergence, objective.beta, objective.temperature)
            if batch.top is not None:
                ids, logprobs = batch.top
                values = divergence_to_top_k(hidden[batch.rows], model.head_weight, ids.long(), logprobs, *how, vocab_size)
            else:
                with torch.no_grad():
                    taught = objective.teacher.hidden(*place)[batch.rows]  # [N, C']
                values = divergence(hidden[batch.rows], model.head_weight, taught, objective.teacher.head_weight, *how, vocab_size)
            sums[way] = values.sum()
    return sums


@dataclass(frozen=True)
class Step:
    """What was run over, by all processes: the loss, what each way adds to it before its weight, tokens, and supervised ones."""

    loss: float
    ways: Mapping[str, float]
    tokens: int
    supervised: int


def accumulate(
    model: Qwen3, packs: Sequence[Examples], objective: Objective = Objective(), world: World = World(), *,
    on_policy: bool = False, gradients: bool = True,
) -> Step:  # fmt: skip
    """Run over this process's packs, and add the gradients of the loss of all processes' packs to the parameters.

    Raises UserError where a GPU has no memory for a pack.
    """
    batches = [collate(pack, model.device) for pack in packs]
    ways = dict(ON_POLICY if on_policy else objective.ways)
    counts = [sum(batch.choices if way == "labels" else len(batch.targets) for batch in batches) for way in ways]
    totals = [sum(len(batch.ids) for batch in batches), sum(len(batch.targets) for batch in batches)]
    *counts, tokens, supervised = map(int, world.sum([*counts, *totals]))
    sums = dict.fromkeys(ways, 0.0)
    for batch in batches:
        with memory_for(batch, "lower --batch-tokens or give --checkpoint-activations"):
            parts = pack_losses(model, batch, objective, list(ways))
            if gradients:
                sum(ways[way] * part / max(1, count) for (way, part), count in zip(parts.items(), counts, strict=True)).backward()
        for way, part in parts.items():
            sums[way] += part.item()
    if gradients:
        world.sum_gradients(parameter for parameter in model.parameters() if parameter.requires_grad)
    sums = world.sum(list(sums.values()))
    means = {way: part / max(1, count) for way, part, count in zip(ways, sums, counts, strict=True)}
    return Step(sum(ways[way] * mean for way, mean in means.items()), means, tokens, supervised)


@torch.no_grad()
def validation_loss(
    model: Qwen3, examples: Examples, batch_tokens: int, objective: Objective = Objective(), world: World = World()
) -> float:
    """The loss of all of `examples` as one step, on-policy left out."""
    packs = [[examples[i] for i in pack] for pack in plan(examples, batch_tokens, seed=0, epoch=0)]
    return accumulate(model, world.share(packs), objective, world, gradients=False).loss
