"""RMSNorm, alone and behind a residual add.

    h = hidden + x,    n = h * rstd,    rstd = 1 / sqrt(mean(h^2) + eps),    y = w * n        over the last axis, of C entries

    g = dy * w,        dx = dhidden = dh + rstd * (g - n * mean(g * n)),     dw = sum over rows of dy * n

Shapes: x, hidden, h, y [..., C], w [C]. Order of roundings as in Hugging Face's Qwen3: the sum in the inputs' dtype, the norm in float32
(float64 for float64 inputs), cast to the inputs' dtype, then multiplied by the weight. Source: arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harkd.kernels.backend import use_triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm_reference(hidden: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    hidden = hidden + x
    return hidden, rms_norm_reference(hidden, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """The norm of x [..., C] under weight [C]. Differentiable in both; a frozen weight costs nothing."""
    if use_triton(backend, x, weight):
        from harkd.kernels.rms_norm_triton import RMSNorm

        return RMSNorm.apply(x, None, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(hidden: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """hidden + x and its norm, each [..., C], in one pass. Differentiable in all three tensors."""
    if use_triton(backend, hidden, x, weight):
        from harkd.kernels.rms_norm_triton import RMSNorm

        dtype = torch.promote_types(hidden.dtype, x.dtype)
        return RMSNorm.apply(x.to(dtype), hidden.to(dtype), weight, eps)
    return add_rms_norm_reference(hidden, x, weight, eps)
