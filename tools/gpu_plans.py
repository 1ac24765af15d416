"""Where, in what and how large tools/gpu_kernels.py checks and measures, and the attention plans of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harkd.kernels.attention import CacheLayer, Sequences


@dataclass(frozen=True)
class Setting:
    """Where, in what, and how large. Measured in `dtype`, checked in `dtypes`."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    heads: tuple[tuple[int, int], ...] = ((16, 8), (64, 8))
    checked: tuple[int, int] = (32, 8)  # heads that are checked too
    dim: int = 128
    pack: tuple[int, int] = (8, 2048)  # sequences of so many tokens
    shared: tuple[int, int, int] = (1000, 8, 700)  # a prefix, and examples of so many tokens behind it
    ragged: tuple[int, ...] = (1, 350, 0, 1027, 64, 129, 700)
    batches: tuple[int, ...] = (1, 8, 64, 256)
    keys: tuple[int, ...] = (512, 2048, 8192)
    page: int = 64
    new: tuple[int, ...] = (1, 5, 40, 200)  # new tokens of sequences behind a cached prefix
    layers: tuple[tuple[str, int, int, int, int], ...] = (("0.6B", 1024, 2048, 1024, 3072), ("32B", 5120, 8192, 1024, 25600))
    tokens: tuple[int, ...] = (8192, 1024, 128)
    rank: int = 16
    wide: tuple[int, int] = (16384, 5120)
    rows: int = 8192
    vocab: int = 151936
    width: int = 1024

    def draw(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) * std

    def queries(self, tokens: int, heads: int, kv_heads: int) -> list[Tensor]:
        """q, k and v."""
        return [self.draw(tokens, n, self.dim) for n in (heads, kv_heads, kv_heads)]


REAL = Setting()


def packed_plans(setting: Setting) -> dict[str, Sequences]:
    prefix, examples, length = setting.shared
    return {
        "pack": Sequences.packed([setting.pack[1]] * setting.pack[0], device=setting.device),
        "shared prefix": Sequences.packed([prefix, *[length] * examples], [-1, *[0] * examples], [prefix], [0], setting.device),
        "ragged pack": Sequences.packed(setting.ragged, device=setting.device),
    }


def cached_plan(setting: Setting, batch: int, keys: int, kv_heads: int, prefix: int = 0) -> tuple[Sequences, CacheLayer]:
    """One new token behind keys - 1 others in each of `batch` sequences, on scattered pages, and behind a prefix that they share."""
    pages, shared = -(-keys // setting.page), -(-prefix // setting.page)
    places = torch.randperm(batch * pages + shared, device=setting.device).int()
    table, behind = places[shared:].view(batch, pages), places[:shared].view(min(prefix, 1), shared)
    ints = partial(torch.tensor, dtype=torch.int32, device=setting.device)
    slots = table[:, (keys - 1) // setting.page].long() * setting.page + (keys - 1) % setting.page
    whose = ints([0 if prefix else -1] * batch), ints([prefix] * len(behind)), ints([-1] * len(behind))
    layer = CacheLayer(*(setting.draw(len(places), setting.page, kv_heads, setting.dim) for _ in range(2)))
    return Sequences(ints(range(batch + 1)), ints([keys - 1] * batch), *whose, 1, keys, prefix, table, behind, slots), layer


def mixed_plan(setting: Setting, kv_heads: int) -> tuple[Sequences, CacheLayer]:
    """A few new tokens or many, behind a prefix in pages: every class of the kernel."""
    new, (prefix, _, past), page = setting.new, setting.shared, setting.page
    counts = [-(-prefix // page), *(-(-(past + n) // page) for n in new)]
    pages = iter(torch.randperm(sum(counts)).tolist())
    rows = [[next(pages) for _ in range(count)] for count in counts]
    width = max(counts)
    tables = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32, device=setting.device)
    places = [(past + i, row) for row, n in zip(rows[1:], new, strict=True) for i in range(n)]
    slots = torch.tensor([row[place // page] * page + place % page for place, row in places], device=setting.device)
    ints = partial(torch.tensor, dtype=torch.int32, device=setting.device)
    starts = ints([sum(new[:i]) for i in range(len(new) + 1)])
    layer = CacheLayer(*(setting.draw(sum(counts), page, kv_heads, setting.dim) for _ in range(2)))
    whose = starts, ints([past] * len(new)), ints([0] * len(new)), ints([prefix]), ints([-1])
    return Sequences(*whose, max(new), past + max(new), prefix, tables[1:], tables[:1], slots), layer
