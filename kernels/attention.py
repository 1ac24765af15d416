"""Attention over packed sequences with shared prefixes and a paged cache, in plain PyTorch.

Each new token sees its shared prefix, its own sequence's past, and the new tokens of its sequence up to itself:

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j,    j in prefix(i) + past(i) + {new tokens of i's sequence up to i}

Shapes: T new tokens of all sequences packed one behind the other, H query heads, K key/value heads (H a multiple of K), D head size, S
sequences, G prefixes, N pages in a table, P tokens in a page. Heads of one group share their keys without repeating them (GQA, arXiv
2305.13245); pages as in arXiv 2309.06180.

A prefix lies in the pack, as a sequence of its own that the others point to (training); with a cache, in its pages (generation).
Here each sequence is one call of torch's fused product, which sums scores and softmax in float32 (float64 for float64 inputs) and never
holds the [n, m] scores of a prompt. What runs in its place: packed_attention.py and cached_attention.py on a GPU, merged_attention.py and
grouped_attention.py on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harkd.kernels.backend import use_triton

HEAD_DIMS = (16, 32, 64, 128)  # what the kernels serve


class CacheLayer(NamedTuple):
    """Keys and values of one layer, each [pages, P, K, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Sequences:
    """Who sees whom among T packed tokens: the attention plan, the same for every layer of a step.

    The tensors are int32 on the device of the tokens, `slots` int64. Past and prefix tokens keep their places: a sequence's token i lies on
    page `block_table[s, i // P]`. `max_q`, `max_k` and `max_prefix` bound the new tokens, own tokens and prefix of any one sequence.
    """

    cu_q: Tensor  # [S+1] where each sequence's new tokens begin; an empty sequence is padding
    past: Tensor  # [S] how many of its own tokens already lie in the cache
    prefix_of: Tensor  # [S] which shared prefix it sees, -1 for none
    prefix_len: Tensor  # [G] length of each shared prefix
    prefix_start: Tensor  # [G] where in the pack it begins; -1 where there is a cache, in whose pages it lies or is stored by this step
    max_q: int
    max_k: int
    max_prefix: int
    block_table: Tensor | None = None  # [S, N] own pages
    prefix_table: Tensor | None = None  # [G, N] the prefixes' pages
    slots: Tensor | None = None  # [T] page * P + offset at which each new token is stored

    @classmethod
    def packed(
        cls,
        lengths: Sequence[int],
        prefix_of: Sequence[int] | None = None,
        prefix_len: Sequence[int] = (),
        prefix_start: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> Sequences:
        """The plan of a pack without a cache: `lengths[s]` tokens of each sequence, prefixes being sequences of the same pack."""
        prefix_of = [-1] * len(lengths) if prefix_of is None else list(prefix_of)
        ints = partial(torch.tensor, dtype=torch.int32, device=device)
        return cls(
            cu_q=ints([0, *accumulate(lengths)]),
            past=ints([0] * len(lengths)),
            prefix_of=ints(prefix_of),
            prefix_len=ints(prefix_len),
            prefix_start=ints(prefix_start),
            max_q=max(lengths, default=0),
            max_k=max(lengths, default=0),
            max_prefix=max(prefix_len, default=0),
        )

    @cached_property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """(first new token, one behind the last, past, prefix) of each sequence, as Python ints."""
        cu_q = self.cu_q.tolist()
        return list(zip(cu_q, cu_q[1:], self.past.tolist(), self.prefix_of.tolist(), strict=False))

    @cached_property
    def tables(self) -> tuple[list[list[int]], list[list[int]]]:
        """Own and prefix pages as Python ints."""
        return tuple([] if table is None else table.tolist() for table in (self.block_table, self.prefix_table))

    @cached_property
    def prefixes(self) -> list[tuple[int, int]]:
        """(length, start in the pack) of each prefix, as Python ints. Raises ValueError where one lies in a cache that is not there."""
        found = list(zip(self.prefix_len.tolist(), self.prefix_start.tolist(), strict=True))
        if self.block_table is None and any(start < 0 for _, start in found):
            raise ValueError("a prefix of these sequences lies in a cache, and there is none")
        return found

    @cached_property
    def work(self) -> dict:
        """Lists of work that the kernels derive from the plan once a step, by kind and tile size."""
        return {}


def attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, cache_layer: CacheLayer | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of T packed new tokens; with a cache, their keys and values are stored in it first.

    Args: q [T, H, D]; k, v [T, K, D]; cache_layer: this layer's pages, where `sequences` has tables and slots; backend: "auto", "torch" or
    "triton", see `use_triton`; "auto" leaves to the reference what the kernels do not serve or serve slowly.
    Returns [T, H, D] in q's dtype. Differentiable in q, k and v where there is no cache.
    Raises ValueError where "triton" cannot be had, H is no multiple of K, or plan and cache do not belong together.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    tables = (sequences.block_table, *([sequences.prefix_table] if len(sequences.prefix_len) else []))
    if any((table is None) != (cache_layer is None) for table in tables):
        raise ValueError("a plan with tables goes with a cache, one without them without")
    if use_triton(backend, q, k, v) and _served(q, backend):
        from harkd.kernels import cached_attention, packed_attention  # here, since they import triton

        if cache_layer is None:
            return packed_attention.packed_attention(q, k, v, sequences)
        cached_attention.store(k, v, sequences.slots, cache_layer)
        return cached_attention.cached_attention(q, sequences, cache_layer)
    if cache_layer is not None:
        store(k, v, sequences.slots, cache_layer)
        if backend == "auto" and q.device.type == "cpu":
            from harkd.kernels.grouped_attention import grouped_attention

            return grouped_attention(q, sequences, cache_layer)
    elif backend == "auto" and q.device.type == "cpu":
        from harkd.kernels.merged_attention import merged_attention

        return merged_attention(q, k, v, sequences)
    outputs = []
    for s, (begin, end, past, prefix) in enumerate(sequences.spans):
        if begin == end:
            continue
        seen = _part(k, v, begin, past + end - begin, cache_layer, sequences.tables[0], s)
        if prefix >= 0:
            length, start = sequences.prefixes[prefix]
            shared = _part(k, v, start, length, cache_layer, sequences.tables[1], prefix)
            seen = [torch.cat(pair, dim=1) for pair in zip(shared, seen, strict=True)]
        outputs.append(_attend(q[begin:end], *seen))
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def _served(q: Tensor, backend: str) -> bool:
    """Whether the kernels take q; an error where they were asked for by name."""
    fits = q.shape[2] in HEAD_DIMS and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if backend == "triton" and not fits:
        raise ValueError(f"the Triton attention kernels take half or float32 and head_dim {HEAD_DIMS}, not {q.dtype} and {q.shape[2]}")
    return fits and (backend == "triton" or q.dtype != torch.float32)


def store(k: Tensor, v: Tensor, slots: Tensor, cache_layer: CacheLayer) -> None:
    """Write new keys and values [T, K, D] to their slots [T] in the cache."""
    cache_layer.keys.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    cache_layer.values.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def _part(
    k: Tensor, v: Tensor, start: int, length: int, cache_layer: CacheLayer | None, tables: list[list[int]], row: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence or a prefix, each [K, length, D]: from `start` on in the pack, or by its row of a cache's `tables`."""
    if cache_layer is not None:
        return read(cache_layer, tables[row], length)
    return k[start : start + length].transpose(0, 1), v[start : start + length].transpose(0, 1)


def read(cache_layer: CacheLayer, table: list[int], length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of a table's pages, each [K, length, D]: a view where the pages lie one behind the other, else a copy."""
    pages = table[: -(-length // cache_layer.keys.shape[1])]
    first, last = (pages[0], pages[-1]) if pages else (0, -1)
    where = slice(first, last + 1) if pages == list(range(first, last + 1)) else pages
    keys, values = (stored[where].flatten(0, 1)[:length].transpose(0, 1) for stored in cache_layer)
    return keys, values


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence: q [n, H, D] over k, v [K, m, D], of which the last n are the new tokens' own. Returns [n, H, D]."""
    (n, heads, dim), (kv_heads, m, _) = q.shape, k.shape
    if n == 1:  # it sees every key: the heads of a group are the rows of one product, and no key is repeated
        return F.scaled_dot_product_attention(q.reshape(1, kv_heads, -1, dim), k[None], v[None]).reshape(1, heads, dim)
    mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], mask, is_causal=n == m, enable_gqa=True)
    return out[0].transpose(0, 1)
