"""Cross-entropy over a large vocabulary, without the logits of all rows.

    nll_n = logsumexp_v(h_n . w_v) - h_n . w_t(n),        d nll_n / d h_n = sum_v (softmax_v(h_n . w) - [v = t(n)]) w_v

h [N, C] hidden rows, w [V, C] the head, t [N] targets. `chunk` rows are projected at a time: at V = 151,936 a float32 tensor of 512 rows
takes 311 MB, one of 8,192 rows 5 GB. The product runs in the head's dtype, everything behind it in float32. Where the head is frozen
(LoRA), the gradient of the rows is taken in the forward pass, while a chunk's probabilities are at hand: one product less than recomputing
them, and no gradient of the head is ever made. Where it is trained, a chunk is recomputed in the backward pass. Source: Cut Your Losses,
arXiv 2411.09009, for the idea.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int | None = None, chunk: int = 512) -> Tensor:
    """-log p(target) [N] in float32 (float64 for float64 inputs).

    Args: hidden [N, C]; head [V, C]; targets [N] int64, below vocab_size; vocab_size: rows of the head from here on are padding and get no
    probability.
    """
    head = head[:vocab_size]
    if not head.requires_grad:
        return _FrozenHead.apply(hidden, head, targets, chunk)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(_nll, h, head, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts])


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(_logits(hidden, head), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """The loss of every row, and with it the gradient of every row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        losses, gradient = [], torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, target = _logits(hidden[rows], head), targets[rows, None]  # [n, V], [n, 1]
            normaliser = logits.logsumexp(-1, keepdim=True)
            losses.append((normaliser - logits.gather(-1, target))[:, 0])
            if gradient is not None:
                p = logits.sub_(normaliser).exp_()
                p.scatter_add_(-1, target, torch.full_like(normaliser, -1.0))
                gradient[rows] = p.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[:, None]).to(gradient.dtype), None, None, None
