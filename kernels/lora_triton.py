"""The Triton kernel of kernels/lora.py, where the formulas are.

The low-rank path does little arithmetic: at rank 16 it costs the bytes it moves. Products with nothing to fuse are torch's own, and forward
no kernel is needed. Backward, `_backward` reads dy once for ds and dB. A program takes BLOCK_M rows and a span of columns, so ds is a sum
over spans and dB one over blocks of rows, both added up in a fixed order, without atomics. The partial sums of dB move 4 r / BLOCK_M times
the bytes of dy, which a second reading of dy undercuts from rank 65 on: there both are products of torch's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from harkd.kernels import lora
from harkd.kernels.tiles import gpu_family, tile_for

PROGRAMS = 256  # of a backward launch, about: twice the multiprocessors of a large GPU, and fixed, so that sums do not depend on the GPU
LARGEST_FUSED_RANK = 64


@triton.jit
def _backward(
    dy, b, low, ds, db, rows, columns, span, low_stride, rank, scale,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds = s dy B [spans, T, r] and dB = s dy^T low [row blocks, out, r], in float32, from one reading of dy [T, out]."""
    block = tl.program_id(0)
    row, k = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, RANK)
    exists = (row < rows)[:, None] & (k < rank)[None, :]
    left = tl.load(low + row.to(tl.int64)[:, None] * low_stride + k[None, :], exists, other=0.0)  # [BLOCK_M, RANK]
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, span, BLOCK_N):
        column = tl.program_id(1) * span + start + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(dy + row.to(tl.int64)[:, None] * columns + column[None, :], inside, other=0.0)
        here = (column < columns)[:, None] & (k < rank)[None, :]
        up = tl.load(b + column[:, None] * rank + k[None, :], here, other=0.0)
        total = tl.dot(grad, up, total, input_precision="ieee")
        part = tl.dot(tl.trans(grad), left, input_precision="ieee") * scale  # [BLOCK_N, RANK]
        tl.store(db + (block.to(tl.int64) * columns + column[:, None]) * rank + k[None, :], part, here)
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * rank + k[None, :]
    tl.store(ds + at, total * scale, exists)


def low_gradients(dy: Tensor, b: Tensor, low: Tensor, scale: float, ds: Tensor) -> Tensor:
    """Fill ds [T, r] with s dy B and return dB [out, r] in float32."""
    (rows, columns), rank = dy.shape, b.shape[1]
    if rank > LARGEST_FUSED_RANK:
        return lora.low_gradients(dy, b, low, scale, ds)
    padded = max(16, triton.next_power_of_2(rank))  # what a matrix unit takes
    tile = tile_for("lora_backward", padded, gpu_family(dy.device))
    if dy.dtype == torch.float32:  # twice as long
        tile = replace(tile, m=tile.m // 2, n=tile.n // 2)
    row_blocks, column_blocks = triton.cdiv(rows, tile.m), triton.cdiv(columns, tile.n)
    span = triton.cdiv(column_blocks * row_blocks, PROGRAMS) * tile.n
    spans = triton.cdiv(columns, span) if rows else 0
    ds_parts = dy.new_empty(spans, rows, rank, dtype=torch.float32)
    db_parts = dy.new_empty(row_blocks, columns, rank, dtype=torch.float32)
    _backward[(row_blocks, spans)](
        dy, b, low, ds_parts, db_parts, rows, columns, span, low.stride(0), rank, scale,
        RANK=padded, BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    ds.copy_(ds_parts.sum(0))
    return db_parts.sum(0)
