"""Attention over the cache on a CPU, over the keys where they lie. The reference is `harkd.kernels.attention`.

Tokens that see the same prefix are taken together, whatever sequences they belong to: R = tokens x heads of a group rows for each key head.
All stretches of a step meet the prefix at once, then each its own past and its new tokens, and what they take from these parts is merged
(kernels/merged_attention.py):

    out = sum_c exp(lse_c) out_c / sum_c exp(lse_c)      c: prefix, past, new tokens up to the token itself

Single tokens of several sequences (decoding) have too few rows for that: up to BLOCK of them meet the prefix in one product, a sequence's
keys pass through the processor's caches in float32, at no cost beside their reading, scores stay in float32, and one sum of weighted rows
of the cache (`embedding_bag`) gives what all of them take from their own values. The largest p is 1, and not rounded:

    p = exp(S - max_m(S))      out = (sum_own p_j v_j + sum_prefix p_j v_j) / sum_m(p)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harkd.kernels.attention import CacheLayer, Sequences, read
from harkd.kernels.merged_attention import add_part, start

BLOCK = 128  # single tokens: their scores, BLOCK x H x m, are to fit into the processor's caches
LONG = 64  # new tokens of a sequence, for which it pays to lay each head's keys one behind the other


class Piece(NamedTuple):
    """New tokens of sequence `s`: tokens `first` to `last` of a block, the last of which is the last of its `keys` own keys."""

    s: int
    first: int
    last: int
    keys: int


def grouped_attention(q: Tensor, sequences: Sequences, cache_layer: CacheLayer) -> Tensor:
    """Attention of q [T, H, D] over prefixes and own tokens that lie in the cache, the new ones too. Returns [T, H, D]."""
    out = torch.empty_like(q)
    page, heads = cache_layer.keys.shape[1:3]
    if "blocks" not in sequences.work:
        sequences.work["blocks"] = [(*block, _places(sequences, block[2], page, heads, q.shape[1])) for block in _blocks(sequences)]
    for prefix, tokens, pieces, places in sequences.work["blocks"]:
        some = q[tokens].unflatten(1, (heads, -1)).transpose(0, 1)  # [K, n, G, D]
        own = [(piece, *read(cache_layer, sequences.tables[0][piece.s], piece.keys)) for piece in pieces]
        shared = None if prefix < 0 else read(cache_layer, sequences.tables[1][prefix], sequences.prefixes[prefix][0])
        done = _stretches(some, shared, own) if places is None else _singles(some, shared, own, cache_layer.values, places)
        out[tokens] = done.transpose(0, 1).flatten(1, 2)
    return out


def _blocks(sequences: Sequences) -> list[tuple[int, Tensor, list[Piece]]]:
    """(prefix, which of the T tokens, the pieces that they are) of each block; single tokens are kept apart from longer stretches."""
    blocks, open_blocks = [], {}
    for s, (begin, end, past, prefix) in enumerate(sequences.spans):
        if begin == end:
            continue
        kind = prefix, end - begin == 1
        if kind not in open_blocks or (kind[1] and len(open_blocks[kind][0]) == BLOCK):
            open_blocks[kind] = [], []
            blocks.append((prefix, *open_blocks[kind]))
        tokens, pieces = open_blocks[kind]
        pieces.append(Piece(s, len(tokens), len(tokens) + end - begin, past + end - begin))
        tokens += range(begin, end)
    return [(prefix, torch.tensor(tokens), pieces) for prefix, tokens, pieces in blocks]


def _stretches(q: Tensor, shared: tuple[Tensor, Tensor] | None, own: list[tuple[Piece, Tensor, Tensor]]) -> Tensor:
    """q [K, n, G, D], keys and values [K, m, D]. Returns [K, n, G, D]."""
    q = q.transpose(1, 2).contiguous()  # [K, G, n, D]
    out, lse = start(q)
    if shared and shared[0].shape[1]:
        add_part(out, lse, q, *_laid(shared, q.shape[2]), False)
    for (_, first, last, length), *stored in own:
        place, new = tuple(x[:, :, first:last] for x in (out, lse, q)), last - first
        keys, values = _laid(stored, new)
        if length > new:
            add_part(*place, keys[:, : length - new], values[:, : length - new], False)
        add_part(*place, keys[:, length - new :], values[:, length - new :], True)
    return out.to(q.dtype).transpose(1, 2)


def _laid(stored: Iterable[Tensor], rows: int) -> list[Tensor]:
    """Keys and values [K, m, D] for so many tokens to see; a head's tokens lie K x D apart in the cache."""
    return [x.contiguous() if rows >= LONG else x for x in stored]


def _places(sequences: Sequences, pieces: list[Piece], page: int, kv_heads: int, heads: int) -> Tensor | None:
    """Where each query head's own values lie among the heads of all tokens of the cache, [n H, m]: the first again behind the last.

    None where the pieces are more than one token each, and for one sequence alone: torch's fused product reads its keys as they are.
    """
    if len(pieces) == 1 or any(piece.last - piece.first > 1 for piece in pieces):
        return None
    lengths, tables = torch.tensor([piece.keys for piece in pieces]), sequences.block_table[[piece.s for piece in pieces]].long()
    i = torch.arange(int(lengths.max())).expand(len(pieces), -1)
    i = torch.where(i < lengths[:, None], i, 0)
    slots = tables.gather(1, i // page) * page + i % page
    return (slots[:, None] * kv_heads + torch.arange(heads)[:, None] // (heads // kv_heads)).flatten(0, 1)


def _singles(
    q: Tensor, shared: tuple[Tensor, Tensor] | None, own: list[tuple[Piece, Tensor, Tensor]], values: Tensor, places: Tensor
) -> Tensor:
    """As `_stretches`, where every piece is one token, which sees all keys; its own values are read from the cache's."""
    kv_heads, n, group, dim = q.shape
    prefix, wide = shared[0].shape[1] if shared else 0, torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide) * dim**-0.5
    scores = rows.new_full((n, kv_heads, group, prefix + places.shape[1]), -torch.inf)
    for i, (piece, keys, _) in enumerate(own):
        scores[i, ..., prefix : prefix + piece.keys] = rows[:, i] @ keys.to(wide).mT
    if prefix:
        scores[..., :prefix] = (rows.flatten(1, 2) @ shared[0].to(wide).mT).view(kv_heads, n, group, prefix).transpose(0, 1)
    p = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    total, p = p.sum(-1, keepdim=True), p.to(q.dtype)
    out = F.embedding_bag(places, values.view(-1, dim), mode="sum", per_sample_weights=p[..., prefix:].reshape(places.shape))
    out = out.view(n, kv_heads, group, dim).to(wide)
    if prefix:
        out += (p[..., :prefix].transpose(0, 1).flatten(1, 2) @ shared[1]).view(kv_heads, n, group, dim).transpose(0, 1)
    return (out / total).to(q.dtype).transpose(0, 1)
