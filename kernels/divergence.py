"""Divergences between student and teacher over a large vocabulary, row by row, without the logits of all rows.

P = softmax(t / T) is the teacher's distribution, Q = softmax(s / T) the student's, s = h . w the logits, T the temperature:

    forward_kl    T^2 KL(P || Q) = T^2 sum_v P_v (log P_v - log Q_v)       d / d s = T (Q - P)
    reverse_kl    T^2 KL(Q || P)                                           d / d s = T Q (log Q - log P - KL(Q || P))
    jsd           T^2 (b KL(P || M) + (1 - b) KL(Q || M))                  d / d s = T (1 - b) Q (log Q - log M - KL(Q || M))
                  with the middle M = b P + (1 - b) Q

All are zero where Q = P and positive elsewhere. `jsd` is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), in its scale:
it tends to 0 at both ends, jsd / b to the forward KL as b -> 0, jsd / (1 - b) to the reverse KL as b -> 1. At b = 0 and b = 1 it is those
limits, so that b spans the three kinds. T^2 keeps the gradient's size at any temperature (arXiv 1503.02531).

Against a teacher's stored top-k, the outcomes are its K tokens and one bucket for all others: P_0 = 1 - sum_k P_k, and Q_0 likewise, taken
as a logsumexp over the other logits. With K = V it is the divergence over the whole vocabulary.

Shapes: N rows, n of a chunk, V vocabulary, C width (the teacher's may differ), K stored tokens. Products run in the heads' dtype, the rest
in float32 (float64 for float64 inputs). The teacher gets no gradient. Where the student's head is frozen, the gradient of its rows is
finished in the forward pass, while a chunk's probabilities are at hand; where it is trained, a chunk is computed again in backward.
A chunk takes at most about ten times the memory of its logits: 0.8 GB at 128 rows and V = 151,936.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harkd.kernels.loss import FrozenHead, logits_of

KINDS = ("forward_kl", "reverse_kl", "jsd")
# (rows, logits / T [n, V], with_slope) -> values [n], and their slope [n, V] in logits / T
Compare = Callable[[slice, Tensor, bool], "tuple[Tensor, Tensor | None]"]


def divergence(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor,
    kind: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0, vocab_size: int | None = None, chunk: int = 128,
) -> Tensor:  # fmt: skip
    """Divergence [N] in float32 between the rows of a student and of a teacher.

    Args: hidden [N, C], head [V, C]; teacher_hidden [N, C'], teacher_head [V', C']; beta: the teacher's share of the middle, for `jsd`;
    vocab_size: rows of both heads from here on are padding and get no probability. Errors: ValueError on what does not fit.
    """
    head, teacher_head, teacher_hidden = head[:vocab_size], teacher_head[:vocab_size].detach(), teacher_hidden.detach()
    kind, beta = _settings(kind, beta, temperature)
    if len(head) != len(teacher_head) or len(hidden) != len(teacher_hidden):
        sizes = f"{len(hidden)} and {len(teacher_hidden)} rows, {len(head)} and {len(teacher_head)} tokens"
        raise ValueError(f"student and teacher differ: {sizes}")

    def compare(rows: slice, logits: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        log_p = logits_of(teacher_hidden[rows], teacher_head).div_(temperature).log_softmax(-1)
        return _compare(kind, beta, logits.log_softmax(-1), log_p.to(logits.dtype), with_slope)

    return _by_chunks(hidden, head, compare, temperature, chunk)


def divergence_to_top_k(
    hidden: Tensor, head: Tensor, top_ids: Tensor, top_logprobs: Tensor,
    kind: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0, vocab_size: int | None = None, chunk: int = 128,
) -> Tensor:  # fmt: skip
    """Divergence [N] in float32 between a student's rows and a teacher's stored top-k, all other tokens being one bucket.

    Args: hidden [N, C], head [V, C]; top_ids [N, K] int64, different within a row; top_logprobs [N, K], natural logarithms, finite, at
    the same temperature; the rest as in `divergence`. A bucket's probability is held above the dtype's epsilon: so much is lost in the
    sum of the others. Errors: ValueError on what does not fit.
    """
    head = head[:vocab_size]
    kind, beta = _settings(kind, beta, temperature)
    if top_ids.shape != top_logprobs.shape or len(top_ids) != len(hidden):
        raise ValueError(f"{len(hidden)} rows, top ids {tuple(top_ids.shape)}, top logprobs {tuple(top_logprobs.shape)}")

    def compare(rows: slice, logits: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        return _compare_top_k(kind, beta, top_ids[rows], top_logprobs[rows].to(logits.dtype), logits, with_slope)

    return _by_chunks(hidden, head, compare, temperature, chunk)


def _settings(kind: str, beta: float, temperature: float) -> tuple[str, float]:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if not 0 <= beta <= 1 or not temperature > 0:
        raise ValueError(f"beta {beta} must lie in 0 to 1, temperature {temperature} above 0")
    return ({0: "forward_kl", 1: "reverse_kl"}.get(beta, kind) if kind == "jsd" else kind), beta


def _compare(kind: str, beta: float, log_q: Tensor, log_p: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Values [n] and, if wanted, their slope in the student's logits [n, V]; both log-probabilities [n, V]."""
    if kind == "forward_kl":
        p = log_p.exp()
        values = (p * (log_p - log_q)).sum(-1)
        return values, log_q.exp().sub_(p) if with_slope else None
    q = log_q.exp()
    if kind == "reverse_kl":
        excess, share = log_q - log_p, 1.0
    else:
        middle = torch.logaddexp(log_p + log(beta), log_q + log(1 - beta))
        excess, share = log_q - middle, 1 - beta
    own = (q * excess).sum(-1)  # KL(Q || P) or KL(Q || M)
    values = own if kind == "reverse_kl" else beta * (log_p.exp() * (log_p - middle)).sum(-1) + share * own
    return values, (excess - own[:, None]).mul_(q).mul_(share) if with_slope else None


def _compare_top_k(kind: str, beta: float, ids: Tensor, log_p: Tensor, logits: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """As `_compare`, between the student's logits [n, V] and the log-probabilities [n, K] of a few ids."""
    least = log(torch.finfo(logits.dtype).eps)
    missing = (-log_p.logsumexp(-1, keepdim=True).exp()).log1p().nan_to_num(least, neginf=least).clamp_min(least)
    log_p = torch.cat([log_p, missing], -1).log_softmax(-1)  # [n, K + 1]
    top, others = logits.gather(-1, ids), logits.scatter(-1, ids, -torch.inf)
    bucket = torch.maximum(others.logsumexp(-1, keepdim=True), top.detach().logsumexp(-1, keepdim=True) + least)
    log_q = torch.cat([top, bucket], -1).log_softmax(-1)  # [n, K + 1]
    values, slope = _compare(kind, beta, log_q, log_p, with_slope)
    if slope is not None:
        slope = (others - bucket).exp_().mul_(slope[:, -1:]).scatter_(-1, ids, slope[:, :-1])
    return values, slope


def _by_chunks(hidden: Tensor, head: Tensor, compare: Compare, temperature: float, chunk: int) -> Tensor:
    def frozen(rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        found, slope = compare(rows, logits_of(hidden[rows], head).div_(temperature), with_gradient)
        return found * temperature**2, None if slope is None else (slope.to(head.dtype) @ head).mul_(temperature)

    if not head.requires_grad:
        return FrozenHead.apply(hidden, frozen, chunk)

    def values(rows: slice, h: Tensor, w: Tensor) -> Tensor:
        return compare(rows, logits_of(h, w) / temperature, False)[0] * temperature**2

    again = partial(checkpoint, values, use_reentrant=False, preserve_rng_state=False)
    parts = [slice(start, start + chunk) for start in range(0, max(len(hidden), 1), chunk)]
    return torch.cat([again(rows, hidden[rows], head) for rows in parts])
