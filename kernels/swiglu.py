"""SwiGLU's product.

    y = silu(gate) * up,    silu(g) = g * s,    s = 1 / (1 + exp(-g))

    dup = dy * silu(gate),    dgate = dy * up * s * (1 + gate * (1 - s))

Shapes: gate, up, y [T, F]. Order of roundings as in Hugging Face's Qwen3: silu in the inputs' dtype, then the product. silu is taken again
in the backward pass, so that only the two inputs are kept. Source: arXiv 2002.05202.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from harkd.kernels.backend import use_triton


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, backend: str = "auto") -> Tensor:
    """silu(gate) * up [T, F] of two tensors [T, F] of one dtype. They may be columns of a wider tensor; differentiable in both.

    Raises ValueError where the kernel cannot take them.
    """
    if use_triton(backend, gate, up):
        from harkd.kernels.swiglu_triton import SwiGLU

        return SwiGLU.apply(gate, up)
    return swiglu_reference(gate, up)
