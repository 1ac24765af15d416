"""The Triton kernels of kernels/rms_norm.py, where the formulas are.

A program holds a few whole rows, so each tensor is read or written once, and the backward pass takes the norm again rather than storing it.
The weight's gradient is added up by each program over its own rows and then over the programs, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from harkd.kernels.tiles import gpu_family, tile_for

TRAINED_BLOCKS = 8  # blocks of rows that a program adds up where the weight is trained: fewer partial sums to write


@triton.jit
def _forward(x, hidden, weight, h, y, rows, size, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    at = row[:, None] * size + column[None, :]  # [ROWS, BLOCK]
    value = tl.load(x + at, inside, other=0.0)
    if ADD:
        value = (tl.load(hidden + at, inside, other=0.0).to(tl.float32) + value.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(h + at, value, inside)
    wide = value.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / size + eps)
    normed = (wide * rstd[:, None]).to(x.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, column < size, other=0.0).to(tl.float32)
    tl.store(y + at, (normed * scale[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    h, weight, dh, dy, dx, dw, rows, size, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ADD: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight + column, column < size, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        row = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        at = row[:, None] * size + column[None, :]  # [ROWS, BLOCK]
        wide = tl.load(h + at, inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 1) / size + eps)[:, None]
        normed = wide * rstd
        g = grad * scale
        out = rstd * (g - normed * (tl.sum(g * normed, 1) / size)[:, None])
        if ADD:
            out += tl.load(dh + at, inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), inside)
        if TRAINED:
            total += tl.sum(grad * normed.to(h.dtype.element_ty).to(tl.float32), 0)
    if TRAINED:
        tl.store(dw + tl.program_id(0).to(tl.int64) * size + column, total, column < size)


def _launch(x: Tensor, size: int) -> tuple[int, int, int]:
    """Rows and columns of a program's block, and its warps."""
    tile, block = tile_for("rms_norm", 0, gpu_family(x.device)), triton.next_power_of_2(size)
    return max(1, tile.n // block), block, max(tile.warps, min(block // 1024, 32))


class RMSNorm(torch.autograd.Function):
    """Of x, or of hidden + x, which is then returned before the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor | None, weight: Tensor, eps: float) -> Any:
        """Keeps h, which is x itself where nothing is added."""
        add, size = hidden is not None, x.shape[-1]
        x, weight, rows = x.contiguous(), weight.contiguous(), x.numel() // size
        hidden = hidden.contiguous() if add else x
        h = torch.empty_like(x) if add else x
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        per_block, block, warps = _launch(x, size)
        grid = (triton.cdiv(rows, per_block),)
        _forward[grid](x, hidden, weight, h, y, rows, size, eps, ROWS=per_block, BLOCK=block, ADD=add, num_warps=warps)
        ctx.save_for_backward(h, weight)
        ctx.eps, ctx.add = eps, add
        return (h, y) if add else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """One gradient for both x and hidden."""
        h, weight = ctx.saved_tensors
        dh, dy = (grad.contiguous() for grad in (grads[0], grads[-1]))
        size, trained = h.shape[-1], ctx.needs_input_grad[2]
        rows, (per_block, block, warps) = h.numel() // size, _launch(h, size)
        blocks = TRAINED_BLOCKS if trained else 1
        programs = triton.cdiv(rows, per_block * blocks)
        dx = torch.empty_like(h)
        dw = torch.empty(programs if trained else 0, size, dtype=torch.float32, device=h.device)
        _backward[(programs,)](
            h, weight, dh, dy, dx, dw, rows, size, ctx.eps,
            ROWS=per_block, BLOCK=block, BLOCKS=blocks, ADD=ctx.add, TRAINED=trained, num_warps=warps,
        )  # fmt: skip
        return dx, dx if ctx.add else None, dw.sum(0).to(weight.dtype) if trained else None, None
