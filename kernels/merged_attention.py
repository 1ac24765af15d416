"""Attention of a pack on a CPU: a sequence's own tokens and its prefix apart, then merged. The reference is `harkd.kernels.attention`.

    lse_c = log sum_{j in c} exp(S_j)      out_c = sum_{j in c} exp(S_j - lse_c) v_j          c: own, up to the token itself; prefix
    out = (1 - w) out_own + w out_prefix,  w = 1 / (1 + exp(lse_own - lse_prefix)),      lse = log(exp(lse_own) + exp(lse_prefix))

with S = q . k / sqrt(D). Each part is one call of torch's fused product, with no mask to hold or to read: the own part leaves the future
out, and the prefix is seen whole. A part's gradients are those of the same product, from the merged out and lse (as arXiv 2310.01889):

    p_j = exp(S_j - lse)      dS_j = p_j (dout . v_j - dout . out)
    dv_j = p_j dout           dk_j = dS_j q / sqrt(D)                  dq = sum_j dS_j k_j / sqrt(D)

A head's tokens lie one behind the other here, [H, T, D]: rows that are K x D apart fall onto the same lines of a processor's caches, and
cost a quarter of the speed. (torch's product takes a row whose scores are all NaN for one that sees nothing, where it has less than a
vector's keys, in the reference too.) Shapes elsewhere as in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from harkd.kernels.attention import Sequences

forward_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # (q, k, v, dropout, causal) -> out, lse
backward_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # (dout, q, k, v, out, lse, dropout, causal)


def merged_attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Attention of q [T, H, D] over k, v [T, K, D] of a pack without a cache. Returns [T, H, D]; differentiable in q, k and v."""
    return _Merged.apply(q, k, v, sequences)


def add_part(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Merge what q [K, G, n, D] takes from k, v [K, m, D] into out [K, G, n, D], zeros where lse [K, G, n] is still -inf: see `start`.

    Causal: the keys are those of the queries' own tokens. Otherwise all queries see all keys, and those of a group are rows of one product.
    """
    k, v = k[:, None], v[:, None]
    if causal:
        part, part_lse = forward_part(q, k.expand_as(q), v.expand_as(q), 0.0, True)
    else:
        part, part_lse = forward_part(rows(q), k, v, 0.0, False)
    part_lse = part_lse.view(lse.shape)
    out.lerp_(part.reshape(out.shape).to(out.dtype), (part_lse - lse).sigmoid()[..., None])
    lse.copy_(torch.logaddexp(lse, part_lse))


def start(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of queries that have seen nothing, in float32 (float64 for float64 inputs): parts may be larger than their sum."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(q, dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)


def rows(x: Tensor) -> Tensor:
    """[K, G, n, D] as [K, 1, G n, D]: queries of one group, all of which see the same keys."""
    return x.flatten(1, 2)[:, None]


def _heads(x: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] as [K, H / K, T, D], a head's tokens one behind the other."""
    return x.transpose(0, 1).contiguous().unflatten(0, (kv_heads, -1))


def _parts(sequences: Sequences) -> list[tuple[slice, slice | None]]:
    """Where each sequence lies in the pack, and where its prefix does."""
    if "parts" not in sequences.work:
        prefixes = [slice(start, start + length) if length else None for length, start in sequences.prefixes]
        seen = [(slice(begin, end), prefixes[g] if g >= 0 else None) for begin, end, _, g in sequences.spans if begin < end]
        sequences.work["parts"] = seen
    return sequences.work["parts"]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        """Keeps q, k, v a head behind the other, the merged out and its lse."""
        q, k, v = (_heads(x, k.shape[1]) for x in (q, k, v))  # [K, G, T, D], [K, 1, T, D], [K, 1, T, D]
        out, lse = start(q)
        for own, prefix in _parts(sequences):
            place = out[:, :, own], lse[:, :, own], q[:, :, own]
            add_part(*place, k[:, 0, own], v[:, 0, own], True)
            if prefix is not None:
                add_part(*place, k[:, 0, prefix], v[:, 0, prefix], False)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sequences = sequences
        return out.flatten(0, 1).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q [T, H, D], and of k and v [T, K, D], each the sum over the parts."""
        q, k, v, out, lse = ctx.saved_tensors
        grad = _heads(grad, len(q))
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for own, prefix in _parts(ctx.sequences):
            dout, some, whole, scale = (x[:, :, own] for x in (grad, q, out, lse))
            made = backward_part(dout, some, *(x[:, :, own].expand_as(some) for x in (k, v)), whole, scale, 0.0, True)
            dq[:, :, own] += made[0]
            for total, part in ((dk, made[1]), (dv, made[2])):
                total[:, :, own] += part.sum(1, keepdim=True)
            if prefix is not None:
                where = k[:, :, prefix], v[:, :, prefix]
                made = backward_part(rows(dout), rows(some), *where, rows(whole), scale.flatten(1)[:, None], 0.0, False)
                dq[:, :, own] += made[0].view_as(dq[:, :, own])
                dk[:, :, prefix] += made[1]
                dv[:, :, prefix] += made[2]
        return *(x.to(q.dtype).flatten(0, 1).transpose(0, 1) for x in (dq, dk, dv)), None
