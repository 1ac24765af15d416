"""Cross-entropy over a large vocabulary, without the logits of all rows.

The target is set against the rest of the vocabulary:

    r_n = logsumexp_{v != t(n)} h_n . w_v,        nll_n = -log p(t(n)) = log(1 + exp(r_n - h_n . w_t(n)))
    d nll_n / d h_n = (1 - p(t(n))) * (sum_{v != t(n)} softmax_v w_v - w_t(n)),    the softmax over the rest

h [N, C] hidden rows, w [V, C] the head, t [N] targets. In this form nothing cancels where the target is nearly certain.

Where the head is frozen (LoRA), logits exist for one tile of rows and vocabulary at a time: its product with w joins a running sum
that is rescaled when the running maximum grows (as attention does over its keys, arXiv 2205.14135), so that logits are never held for
the whole vocabulary, the gradient of the rows is finished in the forward pass, and no gradient of the head is made. Where it is
trained, `chunk` rows are projected at a time and computed again in the backward pass. Products run in the head's dtype, the rest in
float32. Source: Cut Your Losses, arXiv 2411.09009, for the idea.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from harkd.kernels.backend import product_dtype

CPU_TILE = 2**24  # logits: 64 MB; smaller tiles are faster on idle cores, and several times slower beside other processes
GPU_TILE = 2**26  # 256 MB in float32, so that launches do not count


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int | None = None, chunk: int | None = None) -> Tensor:
    """-log p(target) [N] in float32 (float64 for float64 inputs).

    Args: hidden [N, C]; head [V, C]; targets [N] int64, below vocab_size; vocab_size: rows of the head from here on are padding and get no
    probability; chunk: rows at a time, by default 1,024, or 512 where the head is trained. Errors: IndexError on a target outside the
    vocabulary where the tensors lie on a CPU.
    """
    head = head[:vocab_size]
    if targets.device.type == "cpu" and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(head):
        raise IndexError(f"a target is outside the vocabulary of {len(head)}")
    if not head.requires_grad:
        return FrozenHead.apply(hidden, lambda part, slope: _rows(hidden[part], head, targets[part], slope), chunk or 1024)
    chunk = chunk or 512
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(_nll, h, head, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts])


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [n, C] times head [V, C]: [n, V] in float32 (float64 for float64 inputs), the product in the inputs' dtype."""
    logits = F.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(hidden, head), targets, reduction="none")


def _rows(hidden: Tensor, head: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Losses [n] and gradients [n, C] of a few rows, one tile of the vocabulary after the other."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(product_dtype(hidden))
    n, width = hidden.shape
    step = max(1, (CPU_TILE if hidden.device.type == "cpu" else GPU_TILE) // n)
    peak = hidden.new_full((n, 1), torch.finfo(wide).min, dtype=wide)  # finite: a tile may hold nothing but the target
    total, target = torch.zeros_like(peak), torch.zeros_like(peak)
    mean = torch.zeros(n, width, dtype=wide, device=hidden.device) if with_gradient else None
    room = hidden.new_empty(n, min(step, len(head)))  # of every tile: new memory for each would cost a tenth of its product on a CPU
    for start in range(0, len(head), step):
        tile = head[start : start + step].to(hidden.dtype)
        logits = torch.mm(hidden, tile.T, out=room[:, : len(tile)]).to(wide)  # [n, step]
        place = targets[:, None] - start
        inside, place = (place >= 0) & (place < len(tile)), place.clamp(0, len(tile) - 1)
        there = logits.gather(1, place)
        target += there.masked_fill(~inside, 0.0)
        logits.scatter_(1, place, there.masked_fill(inside, -torch.inf))
        before, peak = peak, torch.maximum(peak, logits.amax(1, keepdim=True))
        shrink, p = (before - peak).exp_(), logits.sub_(peak).exp_()
        total.mul_(shrink).add_(p.sum(1, keepdim=True))
        if mean is not None:
            mean.mul_(shrink).add_(p.to(tile.dtype) @ tile)
    total.clamp_min_(torch.finfo(wide).tiny)  # a vocabulary of one has no rest
    margin = peak + total.log() - target
    losses = F.softplus(margin, threshold=50)[:, 0]
    return losses, None if mean is None else mean.div_(total).sub_(head[targets]).mul_(margin.sigmoid())


class FrozenHead(torch.autograd.Function):
    """The value of every row, and with it the row's gradient: of (rows, with_gradient) -> values [n], gradients [n, C], chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, of: Callable[[slice, bool], tuple[Tensor, Tensor | None]], chunk: int) -> Tensor:
        values = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            values[rows], made = of(rows, gradient is not None)
            if gradient is not None:
                gradient[rows] = made
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None
