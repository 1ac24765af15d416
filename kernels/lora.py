"""LoRA: frozen linear maps of one input, each with a low-rank adapter beside it.

    y_i = x W_i^T + s (x A_i^T) B_i^T

    ds_i = s dy_i B_i,    dx = sum over i of dy_i W_i + ds_i A_i,    dA_i = ds_i^T x,    dB_i = s dy_i^T (x A_i^T)

Shapes: x [T, in], W_i [out_i, in], A_i [r, in], B_i [out_i, r], y_i [T, out_i]. Projections that share an input (q, k, v; gate, up) share
its reading: one product for all x A_i^T, which is kept for the backward pass, one for all dA_i, one sum for dx. Source: arXiv 2106.09685.

One rule of dtypes: x and W_i have one dtype, which is that of y_i and of the factors of every product; A_i and B_i (float32 beside half
precision) are cast to it. Sums run in float32. x A_i^T, ds_i and dA_i are rounded to x's dtype once, y_i and dx once for each product that
is added, dB_i not at all (as dA_i from rank 65 on); gradients of A_i and B_i come back in their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harkd.kernels.backend import use_triton


def lora_linear_reference(x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> list[Tensor]:
    outputs = []
    for weight, down, up in zip(weights, a, b, strict=True):
        low = F.linear(x, down.to(x.dtype))  # [T, r]
        outputs.append(F.linear(x, weight) + F.linear(low, up.to(x.dtype)) * scale)
    return outputs


def lora_linear(
    x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float, backend: str = "auto",
    variant: str = "base_last",
) -> list[Tensor]:  # fmt: skip
    """The adapted projections y_i [T, out_i] of one input x [T, in], one for each weight. Differentiable in x, A_i and B_i.

    Args: weights: W_i [out_i, in], frozen; a: A_i [r, in]; b: B_i [out_i, r], r from 1 to 256; variant: of the Triton backend's forward
    pass, "base_last" (the low-rank part is written first and the base product adds itself onto it), "expand" (a kernel adds the low-rank
    part to the base product in place) or "fused" (one kernel does both products).
    """
    if use_triton(backend, x, *weights, *a, *b):
        from harkd.kernels.lora_triton import LoraLinear

        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            raise ValueError("lora_linear gives the base weights no gradient: freeze them")
        return list(LoraLinear.apply(x, scale, variant, *weights, *a, *b))
    return lora_linear_reference(x, weights, a, b, scale)
