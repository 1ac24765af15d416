"""Attention of a few new tokens per sequence over a paged cache, in Triton. The reference is `harkd.kernels.attention`.

New token t of a sequence sees the keys i <= prefix + past + t of one row: its shared prefix, then its own tokens, the new ones last. Each
of the two lies in its pages: token j on page `table[j // P]`, place `j % P`. The row is cut into splits of a fixed size, each gives a
softmax of its own, and a second kernel joins them (arXiv 2205.14135, flash decoding):

    lse_c = log2 sum_{i in c} 2^S_i     out_c = sum_{i in c} 2^(S_i - lse_c) v_i     out = sum_c 2^(lse_c) out_c / sum_c 2^(lse_c)

with S = q . k log2(e) / sqrt(D). The query heads of one key head, and the new tokens, are the rows of one tile. Sequences are served by
classes, by their new tokens x heads of a group: up to 16 rows and up to 64 rows over splits, longer ones in tiles of 64 rows over all their
keys at once. A sequence's class, splits and tiles depend on nothing but itself, and so does its result, to the bit.

Shapes: q [T, H, D]; cache [pages, P, K, D]. Places in the cache are int64.
"""

from __future__ import annotations

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from harkd.kernels.attention import CacheLayer, Sequences
from harkd.kernels.tiles import gpu_family, tile_for

CLASSES = (16, 64, 0)  # most rows of each class, 0: any number
JOINED = 16  # splits that are joined at a time
EXACT = tl.constexpr("ieee")  # float32 inputs are not rounded to tf32


@triton.jit
def _store(
    k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, k_token, k_head, v_token, v_head,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Key and value of one token, all heads, to its slot; a negative slot is nowhere."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    at = tl.arange(0, BLOCK)
    there = (at < K * D) & (slot >= 0)
    key = tl.load(k_ptr + token * k_token + at // D * k_head + at % D, mask=there)
    value = tl.load(v_ptr + token * v_token + at // D * v_head + at % D, mask=there)
    tl.store(keys_ptr + slot * (K * D) + at, key, mask=there)
    tl.store(values_ptr + slot * (K * D) + at, value, mask=there)


@triton.jit
def _sequence(s, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr):
    """(its first new token, how many are new, its prefix or -1, the prefix's length, keys before its first new token)."""
    begin = tl.load(cu_q_ptr + s)
    prefix = tl.load(prefix_of_ptr + s)
    length = tl.load(prefix_len_ptr + prefix, mask=prefix >= 0, other=0)
    return begin, tl.load(cu_q_ptr + s + 1) - begin, prefix, length, length + tl.load(past_ptr + s)


@triton.jit
def _slots(
    i, stop, s, prefix, length, prefix_start_ptr, block_table_ptr, prefix_table_ptr, slots_ptr, block_width, prefix_width, P: tl.constexpr
):  # fmt: skip
    """Where the keys i < stop of sequence s lie in the cache, in int64; a prefix of the same pack lies where it was just stored."""
    shared = i < length
    place = tl.where(shared, i, i - length)
    own_page = tl.load(block_table_ptr + s.to(tl.int64) * block_width + place // P, mask=(i < stop) & (i >= length), other=0)
    start = tl.load(prefix_start_ptr + prefix, mask=prefix >= 0, other=-1)
    prefix_page = tl.load(prefix_table_ptr + prefix.to(tl.int64) * prefix_width + place // P, mask=shared & (start < 0), other=0)
    slot = tl.where(shared, prefix_page, own_page).to(tl.int64) * P + place % P
    packed = shared & (start >= 0)
    return tl.where(packed, tl.load(slots_ptr + start + i, mask=packed, other=0), slot)


@triton.jit
def _attend(
    q_ptr, keys_ptr, values_ptr, out_ptr, lse_ptr, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr,
    prefix_start_ptr, block_table_ptr, prefix_table_ptr, slots_ptr, block_width, prefix_width,
    q_token, q_head, scale, least, most, tiles, room,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one split of its keys: out_c and lse_c in float32; without splits the output itself."""
    s, tile, kv_head, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1), tl.program_id(2)
    begin, new, prefix, length, before = _sequence(s, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr)
    if (new < least) | (new > most) | (tile * M >= new * GROUP):
        return
    rows = tile * M + tl.arange(0, M)
    real = rows < new * GROUP
    token = tl.minimum(rows, new * GROUP - 1) // GROUP  # rows behind the last repeat the last token
    head = kv_head * GROUP + rows % GROUP
    stop = before + tl.minimum((tile * M + M - 1) // GROUP + 1, new)  # one behind the last key that any row sees
    first = split * SPLIT
    if first >= stop:
        return
    if SPLIT:
        stop = tl.minimum(stop, first + SPLIT)
    dims = tl.arange(0, D)
    q = tl.load(q_ptr + ((begin + token).to(tl.int64) * q_token + head * q_head)[:, None] + dims[None, :])
    top, total, out = tl.full([M], float("-inf"), tl.float32), tl.full([M], 0.0, tl.float32), tl.full([M, D], 0.0, tl.float32)
    for key in range(first, stop, N):
        i = key + tl.arange(0, N)
        slot = _slots(
            i, stop, s, prefix, length, prefix_start_ptr, block_table_ptr, prefix_table_ptr, slots_ptr, block_width, prefix_width, P
        )  # fmt: skip
        at = ((slot * (HEADS // GROUP) + kv_head) * D)[:, None] + dims[None, :]
        k = tl.load(keys_ptr + at, mask=(i < stop)[:, None], other=0.0)
        v = tl.load(values_ptr + at, mask=(i < stop)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale  # [M, N]
        scores = tl.where((i < stop)[None, :] & (i[None, :] <= (before + token)[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        seen = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row may see nothing of this split: it is not read then, but no NaN
        weights = tl.exp2(scores - seen[:, None])
        shrink = tl.exp2(top - seen)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=EXACT)
        top = new_top
    total = tl.where(total > 0, total, 1.0)
    out = out / total[:, None]
    if SPLIT:
        at = ((split * tl.num_programs(0) + s).to(tl.int64) * (HEADS // GROUP) + kv_head) * room + rows
        tl.store(lse_ptr + at, top + tl.log2(total), mask=real)
    else:
        at = (begin + token).to(tl.int64) * HEADS + head
    tl.store(out_ptr + at[:, None] * D + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _join(
    parts_ptr, lse_ptr, out_ptr, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr, least, most, room,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """The output of one row: its splits, JOINED at a time, weighed by their log-sum-exp."""
    s, row, kv_head = tl.program_id(0) // room, tl.program_id(0) % room, tl.program_id(1)
    begin, new, prefix, length, before = _sequence(s, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr)
    if (new < least) | (new > most) | (row >= new * GROUP):
        return
    last = before + row // GROUP
    dims = tl.arange(0, D)
    top, total, out = tl.full([1], float("-inf"), tl.float32), tl.full([1], 0.0, tl.float32), tl.full([D], 0.0, tl.float32)
    for first in range(0, last // SPLIT + 1, JOINED):
        splits = first + tl.arange(0, JOINED)
        there = splits * SPLIT <= last
        at = ((splits * (tl.num_programs(0) // room) + s).to(tl.int64) * (HEADS // GROUP) + kv_head) * room + row
        lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights, shrink = tl.exp2(lse - new_top), tl.exp2(top - new_top)
        part = tl.load(parts_ptr + at[:, None] * D + dims[None, :], mask=there[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(part * weights[:, None], 0)
        top = new_top
    at = (begin + row // GROUP).to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP
    tl.store(out_ptr + at * D + dims, (out / total).to(out_ptr.dtype.element_ty))


def _check(cache_layer: CacheLayer) -> None:
    if not all(pages.is_contiguous() for pages in cache_layer):
        raise ValueError("the cache's keys and values must each be contiguous [pages, P, K, D]")


def store(k: Tensor, v: Tensor, slots: Tensor, cache_layer: CacheLayer) -> None:
    """Write new keys and values [T, K, D] to their int64 slots [T] in the cache; a negative slot is skipped.

    Raises ValueError where the cache is a view of something wider.
    """
    _check(cache_layer)
    tokens, heads, dim = k.shape
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    if tokens:
        strides = *k.stride()[:2], *v.stride()[:2]
        _store[(tokens,)](k, v, *cache_layer, slots, *strides, K=heads, D=dim, BLOCK=triton.next_power_of_2(heads * dim))


def cached_attention(q: Tensor, sequences: Sequences, cache_layer: CacheLayer) -> Tensor:
    """Attention of T packed new tokens, whose keys and values are in the cache already.

    Args: q [T, H, D], D a power of two from 16 to 128; `sequences` with a block table; cache_layer contiguous.
    Returns [T, H, D]; rows beyond the last sequence are left unwritten. Not differentiable. Raises ValueError for a cache that is not.
    """
    _check(cache_layer)
    heads, (_, page, kv_heads, dim) = q.shape[1], cache_layer.keys.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    out, group, least = torch.empty(q.shape, dtype=q.dtype, device=q.device), heads // kv_heads, 1
    prefix_table = sequences.block_table if sequences.prefix_table is None else sequences.prefix_table
    whose = sequences.cu_q, sequences.past, sequences.prefix_of, sequences.prefix_len
    where = sequences.prefix_start, sequences.block_table, prefix_table, sequences.slots
    count, scale = len(sequences.past), dim**-0.5 * log2(e)
    for rows in CLASSES:
        most = min(rows // group if rows else sequences.max_q, sequences.max_q)
        if most < least or not count:
            continue
        tile = tile_for("cached", rows, gpu_family(q.device))
        tiles = 1 if rows else triton.cdiv(most * group, tile.m)
        splits, room = (triton.cdiv(sequences.max_k, tile.k), most * group) if rows else (1, 0)
        lse = torch.empty(splits, count, kv_heads, room, dtype=torch.float32, device=q.device)
        parts = torch.empty(*lse.shape, dim, dtype=torch.float32, device=q.device)
        sizes = dict(HEADS=heads, GROUP=group, D=dim, SPLIT=tile.k)
        _attend[count * tiles, kv_heads, splits](
            q, *cache_layer, parts if rows else out, lse, *whose, *where, sequences.block_table.shape[1], prefix_table.shape[1],
            *q.stride()[:2], scale, least, most, tiles, room,
            **sizes, P=page, M=tile.m, N=tile.n, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if rows:
            _join[count * room, kv_heads](parts, lse, out, *whose, least, most, room, **sizes, JOINED=JOINED)
        least = most + 1
    return out
