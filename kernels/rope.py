"""RMSNorm over the head size of queries and keys, and their rotary embedding, in one pass.

    n = w * x / sqrt(mean(x^2) + eps)                                    over the D entries of a head
    y_i = n_i cos_i - n_{i+D/2} sin_i,    y_{i+D/2} = n_{i+D/2} cos_i + n_i sin_i,    i < D/2,    angle_i = p / theta^(2i/D)

    dn_i = dy_i cos_i + dy_{i+D/2} sin_i,    dn_{i+D/2} = dy_{i+D/2} cos_i - dy_i sin_i,    then dx and dw as in kernels/rms_norm.py

Shapes: q [T, H, D], k [T, K, D], q_weight, k_weight [D]; cos, sin [T, 1, D/2], the same for all layers and together as much to read as one
head. Order of roundings as in Hugging Face's Qwen3: angles in float32 and cast, the norm in float32 and cast before its weight. Source:
arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harkd.kernels.backend import use_triton
from harkd.kernels.rms_norm import rms_norm_reference


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles p * theta^(-2i/D), each [T, 1, D/2]."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions.to(wide)[:, None, None] / theta**exponents  # [T, 1, D/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of every head of x [T, heads, D] by their angles (half-split form)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return rotate(rms_norm_reference(q, q_weight, eps), cos, sin), rotate(rms_norm_reference(k, k_weight, eps), cos, sin)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Normed and rotated queries [T, H, D] and keys [T, K, D].

    Args: q [T, H, D]; k [T, K, D], both may be columns of a wider tensor; q_weight, k_weight [D]; cos, sin [T, 1, D/2], as from `rotary`.
    Differentiable in q, k and the weights; frozen weights cost nothing.
    """
    if use_triton(backend, q, k, q_weight, k_weight, cos, sin):
        from harkd.kernels.rope_triton import NormRope

        return NormRope.apply(q, k, q_weight, k_weight, cos, sin, eps)
    return norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)
