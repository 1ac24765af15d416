"""LoRA: frozen linear maps of one input, each with a low-rank adapter beside it.

    y_i = x W_i^T + s (x A_i^T) B_i^T

    ds_i = s dy_i B_i,    dx = sum over i of dy_i W_i + ds_i A_i,    dA_i = ds_i^T x,    dB_i = s dy_i^T (x A_i^T)

Shapes: x [T, in], W_i [out_i, in], A_i [r, in], B_i [out_i, r], y_i [T, out_i]. Projections that share an input (q, k, v; gate, up) share
its reading: one product for all x A_i^T, which is kept for the backward pass, one for all dA_i, one sum for dx. Source: arXiv 2106.09685.

Where the weights are frozen one autograd function does all of it (but for backend "torch", the reference), by products that add to what is
there: nothing as wide as y_i is made only to be scaled or summed. A Triton kernel takes ds_i and dB_i from one reading of dy_i
(kernels/lora_triton.py).

One rule of dtypes: x and W_i have one dtype, which is that of y_i and of the factors of every product; A_i and B_i (float32 beside half
precision) are cast to it. Sums run in float32. x A_i^T, ds_i and dA_i are rounded to x's dtype once, y_i and dx once for each product that
is added, dB_i by the kernel not at all, by products as dA_i; gradients of A_i and B_i come back in their own dtype. Where `product_dtype`
says float32, the factors are those same rounded ones, and y_i and dx are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from harkd.kernels.backend import product_dtype, use_triton


def lora_linear_reference(x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> list[Tensor]:
    outputs = []
    for weight, down, up in zip(weights, a, b, strict=True):
        low = F.linear(x, down.to(x.dtype))  # [T, r]
        outputs.append(F.linear(x, weight) + F.linear(low, up.to(x.dtype)) * scale)
    return outputs


def lora_linear(
    x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float, backend: str = "auto"
) -> list[Tensor]:
    """The adapted projections y_i [T, out_i] of one input x [T, in], one for each weight. Differentiable in x, A_i and B_i.

    Args: weights: W_i [out_i, in], frozen; a: A_i [r, in]; b: B_i [out_i, r], r from 1 to 256.
    """
    fused = use_triton(backend, x, *weights, *a, *b)
    trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if fused and trained:
        raise ValueError("lora_linear gives the base weights no gradient: freeze them")
    if trained or backend == "torch":
        return lora_linear_reference(x, weights, a, b, scale)
    return list(_LoraLinear.apply(x, scale, fused, *weights, *a, *b))


def _output(x: Tensor, weight: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """One projection [T, out]; low [T, r] may be columns of a wider tensor. The low-rank part is written first, and the base product, which
    is bound by arithmetic, reads it while it multiplies."""
    return x.new_empty(len(x), len(b)).addmm_(low, b.T, beta=0, alpha=scale).addmm_(x, weight.T)


def low_gradients(dy: Tensor, b: Tensor, low: Tensor, scale: float, ds: Tensor) -> Tensor:
    """Fill ds [T, r] with s dy B and return dB [out, r] in float32 (float64 for float64 inputs)."""
    ds.addmm_(dy, b, beta=0, alpha=scale)
    db = torch.empty_like(b).addmm_(dy.T, low, beta=0, alpha=scale)  # scaled before it is rounded: half precision is soon too large
    return db.to(torch.promote_types(dy.dtype, torch.float32))


class _LoraLinear(torch.autograd.Function):
    """All projections of one input; `tensors` are the weights, then all A, then all B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, fused: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Keeps x, x A^T and what A and B were cast to."""
        count, x, dtype = len(tensors) // 3, x.contiguous(), product_dtype(x)
        weights, a, wide = tensors[:count], tensors[count : 2 * count], x.to(dtype)
        b = [up.to(x.dtype).contiguous() for up in tensors[2 * count :]]
        ctx.ranks, ctx.scale, ctx.fused, ctx.dtypes = [len(down) for down in a], scale, fused, [t.dtype for t in tensors[count:]]
        down = torch.cat(a).to(x.dtype)  # [sum of r, in]
        low = F.linear(wide, down.to(dtype))  # [T, sum of r]
        parts = zip(weights, low.split(ctx.ranks, 1), b, strict=True)
        ctx.save_for_backward(x, low, down, *weights, *b)
        return tuple(_output(wide, weight.to(dtype), part, up.to(dtype), scale).to(x.dtype) for weight, part, up in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, unless it wants none, and of every A and B."""
        gradients = low_gradients
        if ctx.fused:
            from harkd.kernels.lora_triton import low_gradients as gradients
        x, low, down, *rest = ctx.saved_tensors
        weights, b, wide = rest[: len(grads)], rest[len(grads) :], low.dtype
        grads, own, x = [dy.contiguous().to(wide) for dy in grads], x.dtype, x.to(wide)
        ds = torch.empty_like(low)
        parts = zip(grads, b, low.split(ctx.ranks, 1), ds.split(ctx.ranks, 1), strict=True)
        db = [gradients(dy, up.to(wide), part, ctx.scale, out) for dy, up, part, out in parts]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ds @ down.to(wide)
            for dy, weight in zip(grads, weights, strict=True):
                dx.addmm_(dy, weight.to(wide))
            dx = dx.to(own)
        da = (ds.T @ x).split(ctx.ranks)
        adapters = [grad.to(dtype) for grad, dtype in zip([*da, *db], ctx.dtypes, strict=True)]
        return dx, None, None, *[None] * len(grads), *adapters
