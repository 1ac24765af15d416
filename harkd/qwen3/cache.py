"""The cache of keys and values in pages of equal size, and who holds which page.

Layer i keeps keys and values [pages, P, K, D]. A page belongs to one sequence or one shared prefix at a time; a table of pages says where a
sequence's token i lies: page `table[i // P]`, place `i % P`. On a CPU the memory of a page is not touched, and so costs nothing, before the
page is first used.
"""

from __future__ import annotations

import torch

from harkd.errors import UserError
from harkd.kernels.attention import CacheLayer
from harkd.memory import free_memory
from harkd.qwen3.config import Qwen3Config
from harkd.tensors import allocating


SHARE = 0.5  # of the free memory, for the cache: the rest is for what a step computes, and for others


class Cache:
    """`pages` pages of `page_size` tokens for every layer of a model."""

    def __init__(self, config: Qwen3Config, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (pages, page_size, config.num_key_value_heads, config.head_dim)
        self.page_size = page_size
        with allocating(f"a cache of {pages * page_size} tokens"):
            self.layers = [
                CacheLayer(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
                for _ in range(config.num_hidden_layers)
            ]
        self.free = bytearray(b"\1") * pages  # 1: nobody holds it

    def allocate(self, tokens: int) -> list[int] | None:
        """Pages for `tokens` tokens, or None where too few are free.

        Pages one behind the other are preferred: they can be read without a copy.
        """
        need = page_count(tokens, self.page_size)
        first = self.free.find(b"\1" * need)
        if first >= 0:
            pages = list(range(first, first + need))
        elif self.free.count(1) >= need:
            pages = [page for page, is_free in enumerate(self.free) if is_free][:need]
        else:
            return None
        for page in pages:
            self.free[page] = 0
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        for page in pages:
            self.free[page] = 1

    def slot(self, table: list[int], index: int) -> int:
        """Where token `index` of a sequence lies among all places of the cache."""
        return table[index // self.page_size] * self.page_size + index % self.page_size


def page_count(tokens: int, page_size: int) -> int:
    """Pages that so many tokens take."""
    return -(-tokens // page_size)


def token_bytes(config: Qwen3Config, dtype: torch.dtype) -> int:
    """What the keys and values of one token take in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def cache_of(config: Qwen3Config, tokens: int | None, most: int, page_size: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache of so many tokens; where None is given of `most`, or of as many as fit into SHARE of the free memory, fewer if need be.

    Raises UserError where there is no memory for the given number, or for a single page.
    """
    room = min(most, int(SHARE * free_memory(str(device))) // token_bytes(config, dtype)) if tokens is None else tokens
    pages = page_count(room, page_size)
    while True:
        try:
            return Cache(config, max(pages, 1), page_size, dtype, device)
        except UserError:
            if tokens is not None or pages <= 1:
                raise
            pages //= 2
