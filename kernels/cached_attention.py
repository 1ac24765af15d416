"""Attention of a few new tokens per sequence over a paged cache, in Triton. The reference is `harkd.kernels.attention`.

New token t of a sequence sees the keys i <= prefix + past + t of one row: its shared prefix, then its own tokens, the new ones last. Each
of the two lies in its pages: token j on page `table[j // P]`, place `j % P`, and is cut into splits of a fixed size. Each split gives a
softmax of its own, and a last kernel joins them (arXiv 2205.14135, flash decoding):

    lse_c = log2 sum_{i in c} 2^S_i     out_c = sum_{i in c} 2^(S_i - lse_c) v_i     out = sum_c 2^(lse_c) out_c / sum_c 2^(lse_c)

with S = q . k log2(e) / sqrt(D). Over own tokens the new tokens of one sequence, and the query heads of one key head, are the rows of a
tile. Over a prefix the rows are those of all sequences that share it, so that its keys are read once for many (arXiv 2402.05099).
Sequences are served by classes, by their new tokens x heads of a group: up to 16 rows and up to 64 rows over splits, longer ones in tiles
of 64 rows over all their keys at once. A sequence's class, splits and tiles depend on nothing but itself, nor does a row of a tile on the
others; so its result is the same, to the bit, in any company.

Shapes: q [T, H, D]; cache [pages, P, K, D]. Places in the cache are int64.
"""

from __future__ import annotations

from math import e, log2

import torch
import torch.nn.functional as F
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
def _slots(place, there, row, table_ptr, width, P: tl.constexpr):
    """Where tokens of a sequence or of a prefix lie in the cache, by its row of a table, in int64."""
    page = tl.load(table_ptr + row.to(tl.int64) * width + place // P, mask=there, other=0)
    return page.to(tl.int64) * P + place % P


@triton.jit
def _take(q, slot, there, visible, keys_ptr, values_ptr, kv_head, scale, top, total, out, KV: tl.constexpr, D: tl.constexpr):
    """The running softmax of M rows after N more keys: largest score, sum, and weighted values."""
    at = ((slot * KV + kv_head) * D)[:, None] + tl.arange(0, D)[None, :]
    k = tl.load(keys_ptr + at, mask=there[:, None], other=0.0)
    v = tl.load(values_ptr + at, mask=there[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale  # [M, N]
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    seen = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row may see nothing of this split: it is not read then, but no NaN
    weights = tl.exp2(scores - seen[:, None])
    shrink = tl.exp2(top - seen)
    total = total * shrink + tl.sum(weights, 1)
    return new_top, total, out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=EXACT)


@triton.jit
def _keep(out_ptr, lse_ptr, at, real, top, total, out, D: tl.constexpr):
    """Write rows of one split, out_c and lse_c, to places `at` of [splits, rooms, H]."""
    total = tl.where(total > 0, total, 1.0)
    tl.store(lse_ptr + at, top + tl.log2(total), mask=real)
    tl.store(out_ptr + at[:, None] * D + tl.arange(0, D)[None, :], out / total[:, None], mask=real[:, None])


@triton.jit(do_not_specialize=["prefix_width", "tokens", "rooms"])  # what differs from step to step: no kernel is compiled for a 1 or 16 n
def _attend_prefix(
    q_ptr, keys_ptr, values_ptr, out_ptr, lse_ptr, owner_ptr, place_ptr, prefix_of_ptr, prefix_len_ptr,
    prefix_table_ptr, prefix_width, q_token, q_head, scale, tokens, rooms,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of the prefixes that a tile of rows sees, one prefix after the other: every row sees all of its own."""
    rows, kv_head, split = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1), tl.program_id(2)
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    place = tl.load(place_ptr + token, mask=token < tokens, other=-1)
    s = tl.load(owner_ptr + token, mask=place >= 0, other=0)
    mine = tl.load(prefix_of_ptr + s, mask=place >= 0, other=-1)  # [M]
    none = 1 << 30  # behind every prefix
    prefix = tl.min(tl.where(mine >= 0, mine, none))
    while prefix < none:
        first, length = split * SPLIT, tl.load(prefix_len_ptr + prefix)
        if first < length:
            stop = tl.minimum(length, first + SPLIT)
            at = token.to(tl.int64) * q_token + head * q_head
            q = tl.load(q_ptr + at[:, None] + tl.arange(0, D)[None, :], mask=(place >= 0)[:, None], other=0.0)
            top, total, out = tl.full([M], float("-inf"), tl.float32), tl.full([M], 0.0, tl.float32), tl.full([M, D], 0.0, tl.float32)
            for key in range(first, stop, N):
                i = key + tl.arange(0, N)
                slot = _slots(i, i < stop, prefix, prefix_table_ptr, prefix_width, P)
                visible = (i < stop)[None, :]
                top, total, out = _take(
                    q, slot, i < stop, visible, keys_ptr, values_ptr, kv_head, scale, top, total, out, HEADS // GROUP, D
                )  # fmt: skip
            _keep(out_ptr, lse_ptr, (split * rooms + place).to(tl.int64) * HEADS + head, mine == prefix, top, total, out, D)
        prefix = tl.min(tl.where(mine > prefix, mine, none))


@triton.jit(do_not_specialize=["block_width", "prefix_width", "least", "most", "tiles", "behind", "rooms"])
def _attend(
    q_ptr, keys_ptr, values_ptr, out_ptr, lse_ptr, place_ptr, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr,
    block_table_ptr, prefix_table_ptr, block_width, prefix_width,
    q_token, q_head, scale, least, most, tiles, behind, rooms,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one split of its own keys: out_c and lse_c; without splits over all its keys, and the output itself."""
    s, tile, kv_head, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1), tl.program_id(2)
    begin, new, prefix, length, before = _sequence(s, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr)
    if (new < least) | (new > most) | (tile * M >= new * GROUP):
        return
    rows = tile * M + tl.arange(0, M)
    real = rows < new * GROUP
    token = tl.minimum(rows, new * GROUP - 1) // GROUP  # rows behind the last repeat the last token
    head = kv_head * GROUP + rows % GROUP
    stop = before + tl.minimum((tile * M + M - 1) // GROUP + 1, new)  # one behind the last key that any row sees
    first = 0
    if SPLIT:
        first = length + split * SPLIT
        stop = tl.minimum(stop, first + SPLIT)
    if first >= stop:
        return
    q = tl.load(q_ptr + ((begin + token).to(tl.int64) * q_token + head * q_head)[:, None] + tl.arange(0, D)[None, :])
    top, total, out = tl.full([M], float("-inf"), tl.float32), tl.full([M], 0.0, tl.float32), tl.full([M, D], 0.0, tl.float32)
    for key in range(first, stop, N):
        i = key + tl.arange(0, N)
        slot = _slots(i - length, (i < stop) & (i >= length), s, block_table_ptr, block_width, P)
        if not SPLIT:
            shared = i < tl.minimum(length, stop)
            slot = tl.where(shared, _slots(i, shared, prefix, prefix_table_ptr, prefix_width, P), slot)
        visible = (i < stop)[None, :] & (i[None, :] <= (before + token)[:, None])
        top, total, out = _take(q, slot, i < stop, visible, keys_ptr, values_ptr, kv_head, scale, top, total, out, HEADS // GROUP, D)
    if SPLIT:
        place = tl.load(place_ptr + begin + token)
        _keep(out_ptr, lse_ptr, ((behind + split) * rooms + place).to(tl.int64) * HEADS + head, real, top, total, out, D)
    else:
        at = (begin + token).to(tl.int64) * HEADS + head
        out = out / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + at[:, None] * D + tl.arange(0, D)[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["least", "most", "behind", "rooms"])
def _join(
    parts_ptr, lse_ptr, out_ptr, owner_ptr, place_ptr, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr, least, most, behind, rooms,
    HEADS: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """The output of one token and head: the splits of its prefix and its own, JOINED at a time, weighed by their log-sum-exp."""
    token, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(place_ptr + token)
    if place < 0:
        return
    s = tl.load(owner_ptr + token)
    begin, new, prefix, length, before = _sequence(s, cu_q_ptr, past_ptr, prefix_of_ptr, prefix_len_ptr)
    if (new < least) | (new > most):
        return
    shared = tl.cdiv(length, SHARED)
    own = (before - length + token - begin) // SPLIT + 1
    dims = tl.arange(0, D)
    top, total, out = tl.full([1], float("-inf"), tl.float32), tl.full([1], 0.0, tl.float32), tl.full([D], 0.0, tl.float32)
    for first in range(0, shared + own, JOINED):
        c = first + tl.arange(0, JOINED)
        there = c < shared + own
        split = tl.where(c < shared, c, behind + c - shared)
        at = (split.to(tl.int64) * rooms + place) * HEADS + head
        lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights, shrink = tl.exp2(lse - new_top), tl.exp2(top - new_top)
        part = tl.load(parts_ptr + at[:, None] * D + dims[None, :], mask=there[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(part * weights[:, None], 0)
        top = new_top
    tl.store(out_ptr + (token.to(tl.int64) * HEADS + head) * D + dims, (out / total).to(out_ptr.dtype.element_ty))


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


def _rooms(sequences: Sequences, tokens: int, longest: int) -> tuple[Tensor, Tensor]:
    """The sequence of each of T tokens, and its number among those of sequences with up to `longest` new ones, else -1: int32 [T] each.

    Listed once a step, on the device.
    """
    if "rooms" not in sequences.work:
        numbers = torch.arange(tokens, dtype=torch.int32, device=sequences.cu_q.device)
        owner = torch.searchsorted(sequences.cu_q[1:], numbers, right=True, out_int32=True)  # behind the last sequence: one more than it
        short = F.pad(sequences.cu_q.diff() <= longest, (0, 1))[owner.long()]
        sequences.work["rooms"] = owner, (short.cumsum(0, dtype=torch.int32) - 1).masked_fill(~short, -1)
    return sequences.work["rooms"]


def cached_attention(q: Tensor, sequences: Sequences, cache_layer: CacheLayer) -> Tensor:
    """Attention of T packed new tokens, whose keys and values are in the cache already.

    Args: q [T, H, D], D a power of two from 16 to 128; `sequences` with a block table; cache_layer contiguous.
    Returns [T, H, D]; rows beyond the last sequence are left unwritten. Not differentiable. Raises ValueError for a cache that is not.
    """
    _check(cache_layer)
    (tokens, heads, dim), (_, page, kv_heads, _), count = q.shape, cache_layer.keys.shape, len(sequences.past)
    q = q if q.stride(2) == 1 else q.contiguous()
    out, group, gpu = torch.empty(q.shape, dtype=q.dtype, device=q.device), heads // kv_heads, gpu_family(q.device)
    if not tokens or not count:
        return out
    prefix_table = sequences.block_table if sequences.prefix_table is None else sequences.prefix_table  # there is no prefix: never read
    whose = sequences.cu_q, sequences.past, sequences.prefix_of, sequences.prefix_len
    widths, strides, scale = (sequences.block_table.shape[1], prefix_table.shape[1]), q.stride()[:2], dim**-0.5 * log2(e)
    classes = [(tile_for("cached", rows, gpu), min(rows // group if rows else sequences.max_q, sequences.max_q)) for rows in CLASSES]
    shared, longest = tile_for("cached_prefix", 0, gpu), classes[1][1]
    behind = triton.cdiv(sequences.max_prefix, shared.k)  # splits of prefixes come first
    splits = behind + max(triton.cdiv(sequences.max_k, tile.k) for tile, _ in classes if tile.k)
    owner, place = _rooms(sequences, tokens, longest)
    rooms = min(tokens, count * longest)  # tokens that are served in splits, at most
    lse = torch.empty(splits, rooms, heads, dtype=torch.float32, device=q.device)
    parts = torch.empty(splits, rooms, heads, dim, dtype=torch.float32, device=q.device)
    sizes = dict(HEADS=heads, GROUP=group, D=dim, P=page)
    if rooms and behind:
        _attend_prefix[triton.cdiv(tokens * group, shared.m), kv_heads, behind](
            q, *cache_layer, parts, lse, owner, place, *whose[2:], prefix_table, widths[1], *strides, scale, tokens, rooms,
            **sizes, M=shared.m, N=shared.n, SPLIT=shared.k, num_warps=shared.warps, num_stages=shared.stages,
        )  # fmt: skip
    least = 1
    for tile, most in classes:
        if most < least:
            continue
        tiles = 1 if tile.k else triton.cdiv(most * group, tile.m)
        _attend[count * tiles, kv_heads, triton.cdiv(sequences.max_k, tile.k) if tile.k else 1](
            q, *cache_layer, parts if tile.k else out, lse, place, *whose, sequences.block_table, prefix_table,
            *widths, *strides, scale, least, most, tiles, behind, rooms,
            **sizes, M=tile.m, N=tile.n, SPLIT=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if tile.k:
            _join[tokens, heads](
                parts, lse, out, owner, place, *whose, least, most, behind, rooms,
                HEADS=heads, D=dim, SHARED=shared.k, SPLIT=tile.k, JOINED=JOINED,
            )  # fmt: skip
        least = most + 1
    return out
