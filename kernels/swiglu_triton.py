"""The Triton kernels of kernels/swiglu.py, where the formulas are. A program takes a stretch of one row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from harkd.kernels.tiles import gpu_family, tile_for


@triton.jit
def _place(size, BLOCK: tl.constexpr):
    """Row, columns and which of these exist of this program, of a grid laid out row by row."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < size


@triton.jit
def _forward(gate, up, y, size, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, column, inside = _place(size, BLOCK)
    g = tl.load(gate + row * gate_stride + column, inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * size + column, (silu * u).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(gate, up, dy, dgate, dup, size, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, column, inside = _place(size, BLOCK)
    g = tl.load(gate + row * gate_stride + column, inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside).to(tl.float32)
    grad = tl.load(dy + row * size + column, inside).to(tl.float32)
    s = tl.sigmoid(g)
    at = row * size + column
    tl.store(dup + at, (grad * g * s).to(dup.dtype.element_ty), inside)
    tl.store(dgate + at, (grad * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), inside)


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    tile = tile_for("swiglu", 0, gpu_family(x.device))
    return (x.shape[0] * triton.cdiv(x.shape[1], tile.n),), {"BLOCK": tile.n, "num_warps": tile.warps}


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
            raise ValueError(f"gate and up are [T, F] in one dtype, not {gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}")
        gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
        y = gate.new_empty(gate.shape)
        grid, constants = _launch(gate)
        _forward[grid](gate, up, y, gate.shape[1], gate.stride(0), up.stride(0), **constants)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = dy.contiguous()
        dgate, dup = torch.empty_like(dy), torch.empty_like(dy)
        grid, constants = _launch(gate)
        _backward[grid](gate, up, dy, dgate, dup, gate.shape[1], gate.stride(0), up.stride(0), **constants)
        return dgate, dup
