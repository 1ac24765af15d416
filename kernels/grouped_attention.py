"""Attention over the cache on a CPU, by products over the keys where they lie. The reference is `harkd.kernels.attention`.

Tokens that see the same prefix are taken together, up to BLOCK of them, whatever sequences they belong to: R = tokens x heads of a group
rows for each key head. Stretches of tokens meet the prefix in one product, then each its own keys, with one softmax over both:

    S = [k_prefix; k_own] (q / sqrt(D))^T    [K, m, R]      p = softmax_m(S)      out = p_prefix^T v_prefix + p_own^T v_own    [K, R, D]

Keys come first in the product, because oneDNN takes [n, K, D] read as [K, n, D] more readily than its transpose. Scores are rounded to q's
dtype, as in Hugging Face's eager attention. Single tokens (decoding) have too few rows for that: torch's fused product gives the prefix's
part, for all of them at once, and each one's own part, which are joined as in flash decoding (arXiv 2205.14135):

    out = sum_c exp(lse_c - lse) out_c,    lse = log sum_c exp(lse_c)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harkd.kernels.attention import CacheLayer, Sequences, read

BLOCK = 128  # tokens: their scores, BLOCK x H x m, are to fit into the processor's caches


class Piece(NamedTuple):
    """New tokens of sequence `s`: tokens `first` to `last` of a block, the last of which is the last of its `keys` own keys."""

    s: int
    first: int
    last: int
    keys: int


def grouped_attention(q: Tensor, sequences: Sequences, cache_layer: CacheLayer) -> Tensor:
    """Attention of q [T, H, D] over prefixes and own tokens that lie in the cache, the new ones too. Returns [T, H, D]."""
    if "blocks" not in sequences.work:
        sequences.work["blocks"] = _blocks(sequences)
    out = torch.empty_like(q)
    heads = cache_layer.keys.shape[2]
    for prefix, tokens, pieces in sequences.work["blocks"]:
        some = q[tokens].unflatten(1, (heads, -1)).transpose(0, 1)  # [K, n, G, D]
        own = [(piece, *read(cache_layer, sequences.tables[0][piece.s], piece.keys)) for piece in pieces]
        shared = None if prefix < 0 else read(cache_layer, sequences.tables[1][prefix], sequences.prefixes[prefix][0])
        single = all(piece.last - piece.first == 1 for piece in pieces)
        out[tokens] = (_singles if single else _stretches)(some, shared, own).transpose(0, 1).flatten(1, 2)
    return out


def _blocks(sequences: Sequences) -> list[tuple[int, Tensor, list[Piece]]]:
    """(prefix, which of the T tokens, the pieces that they are) of each block; single tokens are kept apart from longer stretches."""
    blocks, open_blocks = [], {}
    for s, (begin, end, past, prefix) in enumerate(sequences.spans):
        at = begin
        while at < end:
            kind = prefix, end - begin == 1
            if kind not in open_blocks or len(open_blocks[kind][0]) == BLOCK:
                open_blocks[kind] = [], []
                blocks.append((prefix, *open_blocks[kind]))
            tokens, pieces = open_blocks[kind]
            stop = min(end, at + BLOCK - len(tokens))
            pieces.append(Piece(s, len(tokens), len(tokens) + stop - at, past + stop - begin))
            tokens += range(at, stop)
            at = stop
    return [(prefix, torch.tensor(tokens), pieces) for prefix, tokens, pieces in blocks]


def _stretches(q: Tensor, shared: tuple[Tensor, Tensor] | None, own: list[tuple[Piece, Tensor, Tensor]]) -> Tensor:
    """q [K, n, G, D], keys and values [K, m, D]. Returns [K, n, G, D]."""
    kv_heads, n, group, dim = q.shape
    prefix = shared[0].shape[1] if shared else 0
    rows = (q * dim**-0.5).flatten(1, 2).mT  # [K, D, R]
    scores = q.new_full((kv_heads, prefix + max(piece.keys for piece, _, _ in own), n * group), -torch.inf)  # [K, m, R]
    if prefix:
        scores[:, :prefix] = torch.bmm(shared[0], rows)
    for (_, first, last, length), keys, _ in own:
        new, columns = last - first, slice(first * group, last * group)
        seen = torch.bmm(keys, rows[:, :, columns])
        late = torch.ones(new, new, dtype=torch.bool).tril(-1).repeat_interleave(group, 1)  # key j is later than token i
        seen[:, length - new :].masked_fill_(late, -torch.inf)
        scores[:, prefix : prefix + length, columns] = seen
    p = scores.softmax(1)
    out = torch.bmm(p[:, :prefix].contiguous().mT, shared[1]) if prefix else torch.zeros_like(rows.mT)  # [K, R, D]
    for (_, first, last, length), _, values in own:
        columns = slice(first * group, last * group)
        out[:, columns] += torch.bmm(p[:, prefix : prefix + length, columns].contiguous().mT, values)
    return out.unflatten(1, (n, group))


def _singles(q: Tensor, shared: tuple[Tensor, Tensor] | None, own: list[tuple[Piece, Tensor, Tensor]]) -> Tensor:
    """As `_stretches`, where every piece is one token: it sees all keys, and the heads of a group are the rows of one product."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = [fused(q[None, :, i], keys[None], values[None]) for i, (_, keys, values) in enumerate(own)]
    out, lse = (torch.stack(part, 2)[0] for part in zip(*parts, strict=True))  # [K, n, G, D], [K, n, G]
    if not shared or not shared[0].shape[1]:
        return out
    shared_out, shared_lse = fused(q.flatten(1, 2)[None], shared[0][None], shared[1][None])  # [1, K, R, D], [1, K, R]
    weight = (shared_lse.view_as(lse) - lse).sigmoid()[..., None]  # of the prefix's part
    return torch.lerp(out.to(weight.dtype), shared_out.view_as(out).to(weight.dtype), weight).to(q.dtype)
