"""Attention over packed sequences with shared prefixes, forward and backward, in Triton. The reference is `harkd.kernels.attention`.

Row i sees the keys j of its prefix and of its own sequence up to itself. In tiles of M rows by N keys, with s = 2^x softmax (arXiv
2205.14135, 2307.08691), P in the inputs' dtype where it enters a product:

    S = Q K^T log2(e) / sqrt(D)     lse_i = log2 sum_j 2^S_ij     P_ij = 2^(S_ij - lse_i)     O = P V
    delta_i = dO_i . O_i            dS = P * (dO V^T - delta)     dQ = dS K / sqrt(D)         dK = dS^T Q / sqrt(D)     dV = P^T dO

Shapes: q, out [T, H, D]; k, v [T, K, D], query head h reads key head h // (H / K); lse and delta [H, T] in float32.

A list of work, made on the host once a step and shared by all layers, says which rows see which keys; tiles outside of it are never read.
dK and dV come from a kernel of their own, one program for one tile of keys, one key head and one range of rows, so nothing is added by
atomics. A prefix's keys are seen by its own rows and by those of all its sequences: these are cut into ranges of RANGE rows, each range
gives a partial sum in float32, and the partial sums are added in a fixed order.
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from harkd.kernels.attention import Sequences
from harkd.kernels.tiles import Tile, gpu_family, tile_for

RANGE = 1024
EXACT = tl.constexpr("ieee")  # float32 inputs are not rounded to tf32


@triton.jit
def _load(ptr, row, end, head, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, D]: rows from `row` on of one head of a packed [T, HEADS, D], zeros from `end` on."""
    rows = tl.arange(0, ROWS)
    at = (row.to(tl.int64) * HEADS + head) * D + rows[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    return tl.load(ptr + at, mask=(row + rows < end)[:, None], other=0.0)


@triton.jit
def _store(ptr, tile, row, end, head, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    at = (row.to(tl.int64) * HEADS + head) * D + rows[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=(row + rows < end)[:, None])


@triton.jit
def _rows(items_ptr):
    """One tile of rows: (first row, one behind its sequence, first of its sequence, first of its prefix, length of its prefix)."""
    item = items_ptr + 5 * tl.program_id(1)
    return tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)


@triton.jit
def _keys(b, shared_blocks, row, end, begin, prefix, length, N: tl.constexpr):
    """Tile b of keys, the prefix's before its own: (first key, one behind the last to read, one behind the last the first row sees)."""
    shared = b < shared_blocks
    stop = tl.where(shared, prefix + length, end)
    return tl.where(shared, prefix + b * N, begin + (b - shared_blocks) * N), stop, tl.where(shared, stop, row + 1)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, items_ptr, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """O and lse of one tile of rows and one head, with the running maximum and sum of the softmax."""
    head = tl.program_id(0)
    row, end, begin, prefix, length = _rows(items_ptr)
    rows = row + tl.arange(0, M)
    q = _load(q_ptr, row, end, head, HEADS, D, M)
    top, total, out = tl.full([M], float("-inf"), tl.float32), tl.full([M], 0.0, tl.float32), tl.full([M, D], 0.0, tl.float32)
    shared_blocks = tl.cdiv(length, N)
    for b in range(shared_blocks + tl.cdiv(tl.minimum(row + M, end) - begin, N)):
        key, stop, seen = _keys(b, shared_blocks, row, end, begin, prefix, length, N)
        k = _load(k_ptr, key, stop, head // GROUP, HEADS // GROUP, D, N)
        v = _load(v_ptr, key, stop, head // GROUP, HEADS // GROUP, D, N)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT)  # [M, N]
        if key + N > seen:  # row i of the tile sees i keys more than the first, within its sequence
            scores = tl.where((key + tl.arange(0, N))[None, :] < tl.minimum(seen + tl.arange(0, M), stop)[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)  # finite: every row sees the first key of the first tile
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=EXACT)
        top = new_top
    _store(out_ptr, out / total[:, None], row, end, head, HEADS, D, M)
    tl.store(lse_ptr + head * tokens + rows, top + tl.log2(total), mask=rows < end)


@triton.jit
def _delta(out_ptr, dout_ptr, delta_ptr, tokens, HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """delta_i = dO_i . O_i of M rows and one head."""
    head, row = tl.program_id(0), tl.program_id(1) * M
    product = _load(out_ptr, row, tokens, head, HEADS, D, M).to(tl.float32) * _load(dout_ptr, row, tokens, head, HEADS, D, M)
    rows = row + tl.arange(0, M)
    tl.store(delta_ptr + head * tokens + rows, tl.sum(product, 1), mask=rows < tokens)


@triton.jit
def _backward_rows(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, items_ptr, tokens, scale, norm,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of rows and one head."""
    head = tl.program_id(0)
    row, end, begin, prefix, length = _rows(items_ptr)
    rows = row + tl.arange(0, M)
    q = _load(q_ptr, row, end, head, HEADS, D, M)
    dout = _load(dout_ptr, row, end, head, HEADS, D, M)
    lse = tl.load(lse_ptr + head * tokens + rows, mask=rows < end, other=float("inf"))
    delta = tl.load(delta_ptr + head * tokens + rows, mask=rows < end, other=0.0)
    dq = tl.full([M, D], 0.0, tl.float32)
    shared_blocks = tl.cdiv(length, N)
    for b in range(shared_blocks + tl.cdiv(tl.minimum(row + M, end) - begin, N)):
        key, stop, seen = _keys(b, shared_blocks, row, end, begin, prefix, length, N)
        k = _load(k_ptr, key, stop, head // GROUP, HEADS // GROUP, D, N)
        v = _load(v_ptr, key, stop, head // GROUP, HEADS // GROUP, D, N)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=EXACT) * scale - lse[:, None])  # [M, N]
        if key + N > seen:  # row i of the tile sees i keys more than the first, within its sequence
            weights = tl.where((key + tl.arange(0, N))[None, :] < tl.minimum(seen + tl.arange(0, M), stop)[:, None], weights, 0.0)
        dscores = weights * (tl.dot(dout, tl.trans(v), input_precision=EXACT) - delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=EXACT)
    _store(dq_ptr, dq * norm, row, end, head, HEADS, D, M)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_parts_ptr, dv_parts_ptr, items_ptr, tokens, scale, norm,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys and one key head, summed over one range of rows and the group's query heads."""
    kv_head = tl.program_id(0)
    item = items_ptr + 6 * tl.program_id(1)  # first key, one behind the last, rows likewise, causal or not, row of the partial sum or -1
    key, stop, begin, end, causal, part = (
        tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    )  # fmt: skip
    keys = key + tl.arange(0, N)
    k = _load(k_ptr, key, stop, kv_head, HEADS // GROUP, D, N)
    v = _load(v_ptr, key, stop, kv_head, HEADS // GROUP, D, N)
    dk, dv = tl.full([N, D], 0.0, tl.float32), tl.full([N, D], 0.0, tl.float32)
    first_row = tl.where(causal > 0, keys, begin)
    blocks = tl.cdiv(end - begin, M)
    for i in range(GROUP * blocks):
        head = kv_head * GROUP + i // blocks
        row = begin + i % blocks * M
        rows = row + tl.arange(0, M)
        q = _load(q_ptr, row, end, head, HEADS, D, M)
        dout = _load(dout_ptr, row, end, head, HEADS, D, M)
        lse = tl.load(lse_ptr + head * tokens + rows, mask=rows < end, other=float("inf"))
        delta = tl.load(delta_ptr + head * tokens + rows, mask=rows < end, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=EXACT) * scale - lse[None, :])  # [N, M]
        weights = tl.where(first_row[:, None] <= rows[None, :], weights, 0.0)
        dv += tl.dot(weights.to(dout.dtype), dout, input_precision=EXACT)
        dscores = weights * (tl.dot(v, tl.trans(dout), input_precision=EXACT) - delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=EXACT)
    if part < 0:
        _store(dk_ptr, dk * norm, key, stop, kv_head, HEADS // GROUP, D, N)
        _store(dv_ptr, dv, key, stop, kv_head, HEADS // GROUP, D, N)
    else:
        _store(dk_parts_ptr, dk * norm, part, part + stop - key, kv_head, HEADS // GROUP, D, N)
        _store(dv_parts_ptr, dv, part, part + stop - key, kv_head, HEADS // GROUP, D, N)


def _row_items(sequences: Sequences, m: int) -> list[tuple[int, ...]]:
    """The work of `_rows`, the longest first."""
    items = []
    for begin, end, _, g in sequences.spans:
        length, start = sequences.prefixes[g] if g >= 0 else (0, 0)
        items += [(row, end, begin, start, length) for row in range(begin, end, m)]
    return sorted(items, key=lambda item: item[2] - item[0] - item[4])


def _visitors(sequences: Sequences) -> dict[int, list[tuple[int, int]]]:
    """The ranges of at most RANGE rows that see a prefix, by the prefix's first token; sequences side by side share a range."""
    own = {begin: end - begin for begin, end, _, _ in sequences.spans if end > begin}
    runs: dict[int, list[list[int]]] = {}
    for begin, end, _, g in sequences.spans:
        if g < 0 or begin == end or sequences.prefixes[g][0] == 0:
            continue
        length, start = sequences.prefixes[g]
        if own.get(start) != length:
            raise ValueError(f"prefix {g} ({length} tokens from {start} on) is not a sequence of the pack")
        run = runs.setdefault(start, [])
        if run and run[-1][1] == begin:
            run[-1][1] = end
        else:
            run.append([begin, end])
    return {start: [(a, min(a + RANGE, end)) for begin, end in run for a in range(begin, end, RANGE)] for start, run in runs.items()}


def _key_items(sequences: Sequences, n: int) -> tuple[list[tuple[int, ...]], list[tuple[int, int, int, int]]]:
    """The work of `_backward_keys`, the longest first, and (first token, one behind the last, first partial row, parts) of each prefix."""
    visitors, items, sums, part = _visitors(sequences), [], [], 0
    for begin, end, _, _ in sequences.spans:
        ranges = visitors.get(begin, []) if end > begin else []
        for key in range(begin, end, n):
            items.append((key, end, key, end, 1, part + key - begin if ranges else -1))
            items += [(key, end, *rows, 0, part + i * (end - begin) + key - begin) for i, rows in enumerate(ranges, start=1)]
        if ranges:
            sums.append((begin, end, part, 1 + len(ranges)))
            part += (1 + len(ranges)) * (end - begin)
    return sorted(items, key=lambda item: item[2] - item[3]), sums


def _work(sequences: Sequences, kind: str, size: int, device: torch.device) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """A list of work on the device, [W, 5 or 6] in int32, and the prefixes to sum: made once a step."""
    if (kind, size) not in sequences.work:
        items, sums = (_row_items(sequences, size), []) if kind == "rows" else _key_items(sequences, size)
        sequences.work[kind, size] = torch.tensor(items, dtype=torch.int32).to(device), sums
    return sequences.work[kind, size]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        tokens, heads, dim = q.shape
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
        tile = tile_for("packed_forward", dim, gpu_family(q.device))
        items, _ = _work(sequences, "rows", tile.m, q.device)
        _forward[heads, len(items)](q, k, v, out, lse, items, tokens, dim**-0.5 * log2(e), **_constants(q, k, tile))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sequences = sequences
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """dQ by rows; dK and dV by keys, a prefix's as partial sums that are added in their order."""
        q, k, v, out, lse = ctx.saved_tensors
        (tokens, heads, dim), kv_heads, gpu = q.shape, k.shape[1], gpu_family(q.device)
        dout, delta, norm = dout.contiguous(), torch.empty_like(lse), dim**-0.5
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _delta[heads, triton.cdiv(tokens, 64)](out, dout, delta, tokens, HEADS=heads, D=dim, M=64)

        tile = tile_for("packed_backward_rows", dim, gpu)
        items, _ = _work(ctx.sequences, "rows", tile.m, q.device)
        inputs = q, k, v, dout, lse, delta
        _backward_rows[heads, len(items)](*inputs, dq, items, tokens, norm * log2(e), norm, **_constants(q, k, tile))

        tile = tile_for("packed_backward_keys", dim, gpu)
        items, sums = _work(ctx.sequences, "keys", tile.n, q.device)
        parts = torch.empty(2, sum((end - begin) * n for begin, end, _, n in sums), *k.shape[1:], dtype=torch.float32, device=q.device)
        _backward_keys[kv_heads, len(items)](*inputs, dk, dv, *parts, items, tokens, norm * log2(e), norm, **_constants(q, k, tile))
        for begin, end, part, n in sums:
            for grad, part_sums in zip((dk, dv), parts, strict=True):
                grad[begin:end] = part_sums[part : part + n * (end - begin)].view(n, end - begin, *k.shape[1:]).sum(0)
        return dq, dk, dv, None


def _constants(q: Tensor, k: Tensor, tile: Tile) -> dict[str, int]:
    heads, dim = q.shape[1:]
    sizes = dict(HEADS=heads, GROUP=heads // k.shape[1], D=dim, M=tile.m, N=tile.n)
    return sizes | dict(num_warps=tile.warps, num_stages=tile.stages)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Attention of T packed tokens whose prefixes, if any, are sequences of the pack.

    Args: q [T, H, D]; k, v [T, K, D] in one dtype; D a power of two from 16 to 128.
    Returns [T, H, D]. Differentiable in q, k and v; the same inputs give the same bits.
    Raises ValueError where a prefix is no whole sequence of the pack.
    """
    return _PackedAttention.apply(q, k, v, sequences) if len(q) else torch.zeros_like(q)
