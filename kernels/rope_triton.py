"""The Triton kernels of kernels/rope.py, where the formulas are.

Heads are rows of D entries, held as two halves. One launch covers queries and keys: the first programs take heads of q, the others of k.
The backward pass takes the norm again from q and k; partial sums of the weights' gradients, one for each program, are added in a fixed
order.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from harkd.kernels.tiles import gpu_family, tile_for


@triton.jit
def _pair(pointer, at, inside, HALF: tl.constexpr):
    """Both halves of some heads, in float32."""
    first = tl.load(pointer + at, inside, other=0.0).to(tl.float32)
    return first, tl.load(pointer + at + HALF, inside, other=0.0).to(tl.float32)


@triton.jit
def _heads(x, weight, cos, sin, block, stride, rows, heads, eps, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Both halves of this block's heads, divided by their rms, each [ROWS, BLOCK]; 1 / rms; both halves of the weight; cosines and sines;
    where the heads lie in a packed tensor; and which entries exist.
    """
    row, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    token = (row // heads).to(tl.int64)
    first, second = _pair(x, (token * stride + row % heads * (2 * HALF))[:, None] + column[None, :], inside, HALF)
    rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    w_first, w_second = _pair(weight, column[None, :], column[None, :] < HALF, HALF)
    angle = token[:, None] * HALF + column[None, :]
    c, s = tl.load(cos + angle, inside, other=0.0).to(tl.float32), tl.load(sin + angle, inside, other=0.0).to(tl.float32)
    packed = row.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
    return first * rstd, second * rstd, rstd, w_first, w_second, c, s, packed, inside


@triton.jit
def _forward(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, tokens, q_heads, k_heads, q_stride, k_stride, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    q_blocks = tl.cdiv(tokens * q_heads, ROWS)
    is_q = tl.program_id(0) < q_blocks
    block, heads = tl.program_id(0) - tl.where(is_q, 0, q_blocks), tl.where(is_q, q_heads, k_heads)
    weight, stride, y = tl.where(is_q, q_weight, k_weight), tl.where(is_q, q_stride, k_stride), tl.where(is_q, q_out, k_out)
    first, second, _, w_first, w_second, c, s, packed, inside = _heads(
        tl.where(is_q, q, k), weight, cos, sin, block, stride, tokens * heads, heads, eps, HALF, BLOCK, ROWS
    )
    kind = q.dtype.element_ty
    first = (first.to(kind).to(tl.float32) * w_first).to(y.dtype.element_ty).to(tl.float32)
    second = (second.to(kind).to(tl.float32) * w_second).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + packed, (first * c - second * s).to(y.dtype.element_ty), inside)
    tl.store(y + packed + HALF, (second * c + first * s).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    q, k, q_weight, k_weight, cos, sin, dq_out, dk_out, dq, dk, dw, tokens, q_heads, k_heads, q_stride, k_stride, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TRAINED: tl.constexpr,
):  # fmt: skip
    q_blocks = tl.cdiv(tokens * q_heads, ROWS)
    is_q = tl.program_id(0) < q_blocks
    block, heads = tl.program_id(0) - tl.where(is_q, 0, q_blocks), tl.where(is_q, q_heads, k_heads)
    weight, stride, dx = tl.where(is_q, q_weight, k_weight), tl.where(is_q, q_stride, k_stride), tl.where(is_q, dq, dk)
    first, second, rstd, w_first, w_second, c, s, packed, inside = _heads(
        tl.where(is_q, q, k), weight, cos, sin, block, stride, tokens * heads, heads, eps, HALF, BLOCK, ROWS
    )
    up, down = _pair(tl.where(is_q, dq_out, dk_out), packed, inside, HALF)
    up, down = up * c + down * s, down * c - up * s  # with respect to the norm's result
    if TRAINED:
        column = tl.arange(0, BLOCK)
        at = dw + tl.program_id(0).to(tl.int64) * (2 * HALF) + column
        tl.store(at, tl.sum(up * first.to(q.dtype.element_ty).to(tl.float32), 0), column < HALF)
        tl.store(at + HALF, tl.sum(down * second.to(q.dtype.element_ty).to(tl.float32), 0), column < HALF)
    up, down = up * w_first, down * w_second
    mean = ((tl.sum(up * first, 1) + tl.sum(down * second, 1)) / (2 * HALF))[:, None]
    tl.store(dx + packed, (rstd * (up - first * mean)).to(dx.dtype.element_ty), inside)
    tl.store(dx + packed + HALF, (rstd * (down - second * mean)).to(dx.dtype.element_ty), inside)


def _packed_heads(x: Tensor) -> Tensor:
    """x [T, heads, D] with its heads one behind the other; tokens may lie apart, as in columns of a joined product."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _launch(q: Tensor, k: Tensor) -> tuple[int, int, dict[str, int]]:
    """Programs for q, programs for k, and the constants of a launch."""
    half = q.shape[2] // 2
    tile, block = tile_for("rope", 0, gpu_family(q.device)), triton.next_power_of_2(half)
    rows = max(1, tile.n // (2 * block))
    blocks = [triton.cdiv(x.shape[0] * x.shape[1], rows) for x in (q, k)]
    return *blocks, {"HALF": half, "BLOCK": block, "ROWS": rows, "num_warps": tile.warps}


class NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Any:
        q, k, cos, sin = _packed_heads(q), _packed_heads(k), cos.contiguous(), sin.contiguous()
        q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
        dtypes = (reduce(torch.promote_types, (x.dtype, weight.dtype, cos.dtype)) for x, weight in ((q, q_weight), (k, k_weight)))
        outputs = [x.new_empty(x.shape, dtype=dtype) for x, dtype in zip((q, k), dtypes, strict=True)]
        q_blocks, k_blocks, constants = _launch(q, k)
        sizes = len(q), q.shape[1], k.shape[1], q.stride(0), k.stride(0), eps
        _forward[(q_blocks + k_blocks,)](q, k, q_weight, k_weight, cos, sin, *outputs, *sizes, **constants)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q and k, and of those weights that want one."""
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        q_blocks, k_blocks, constants = _launch(q, k)
        dq, dk = (x.new_empty(x.shape) for x in (q, k))
        trained = any(ctx.needs_input_grad[2:4])
        dw = torch.empty(q_blocks + k_blocks if trained else 0, q.shape[2], dtype=torch.float32, device=q.device)
        sizes = len(q), q.shape[1], k.shape[1], q.stride(0), k.stride(0), ctx.eps
        _backward[(q_blocks + k_blocks,)](
            q, k, q_weight, k_weight, cos, sin, dq_out.contiguous(), dk_out.contiguous(), dq, dk, dw, *sizes, TRAINED=trained, **constants
        )
        dq_weight = dw[:q_blocks].sum(0).to(q_weight.dtype) if ctx.needs_input_grad[2] else None
        dk_weight = dw[q_blocks:].sum(0).to(k_weight.dtype) if ctx.needs_input_grad[3] else None
        return dq, dk, dq_weight, dk_weight, None, None, None
