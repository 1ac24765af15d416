"""Tile sizes of the Triton kernels: one table, looked up by kernel, size and GPU family, with a default for every other GPU.

Nothing is tuned at import or at the first call, so a rerun adds up in the same order. The default of a kernel fits 99 KB of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

ANY = ""  # every GPU family without a row of its own


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one program's tile (0 where a kernel has no such side), and how it is launched."""

    m: int = 0
    n: int = 0
    k: int = 0
    warps: int = 4
    stages: int = 2


# (kernel, size that the kernel is specialised for (head_dim, rank ...) or 0 for every other, GPU family or ANY)
TILES: dict[tuple[str, int, str], Tile] = {
    # size: head_dim; m rows and n keys
    ("packed_forward", 0, ANY): Tile(m=64, n=64),
    ("packed_forward", 64, "sm90"): Tile(m=128, n=64, stages=3),
    ("packed_forward", 128, "sm90"): Tile(m=128, n=64, warps=8, stages=3),
    ("packed_backward_rows", 0, ANY): Tile(m=64, n=64),
    ("packed_backward_keys", 0, ANY): Tile(m=64, n=64),
    ("packed_backward_keys", 128, ANY): Tile(m=32, n=64),
    ("packed_backward_keys", 128, "sm90"): Tile(m=32, n=64, stages=3),
    ("packed_backward_keys", 64, "gfx942"): Tile(m=32, n=64),
    ("packed_backward_keys", 128, "gfx942"): Tile(m=32, n=64, stages=1),
    # size: most rows of a class, 0 any; m rows and n keys; k: keys of a split, 0 all
    ("cached", 16, ANY): Tile(m=16, n=64, k=256),
    ("cached", 16, "sm90"): Tile(m=16, n=64, k=256, stages=3),
    ("cached", 64, ANY): Tile(m=64, n=32, k=512),
    ("cached", 64, "sm90"): Tile(m=64, n=64, k=512),
    ("cached", 64, "gfx942"): Tile(m=64, n=32, k=512, stages=1),
    ("cached", 0, ANY): Tile(m=64, n=32),
    ("cached", 0, "sm90"): Tile(m=64, n=64),
    ("cached_prefix", 0, ANY): Tile(m=64, n=32, k=256, warps=8),
    ("cached_prefix", 0, "sm90"): Tile(m=64, n=64, k=256, warps=8),
    # size: the rank, padded; m rows and n columns of dy
    ("lora_backward", 0, ANY): Tile(m=256, n=64),
    ("lora_backward", 32, ANY): Tile(m=128, n=64),
    ("lora_backward", 64, ANY): Tile(m=128, n=64, warps=8),
    # n: entries of a program, in as many whole rows as that makes; swiglu: of one row
    ("rms_norm", 0, ANY): Tile(n=4096, warps=8),
    ("rope", 0, ANY): Tile(n=4096),
    ("swiglu", 0, ANY): Tile(n=1024),
}


def tile_for(kernel: str, size: int, gpu: str) -> Tile:
    """The tile of a kernel: the row of this size and GPU family, else of this size, else of this family, else of the kernel."""
    for key in ((kernel, size, gpu), (kernel, size, ANY), (kernel, 0, gpu), (kernel, 0, ANY)):
        if key in TILES:
            return TILES[key]
    raise KeyError(f"no tile for kernel {kernel!r} at size {size}")


@cache
def gpu_family(device: torch.device) -> str:
    """The name of a GPU's generation, such as sm90 or gfx942; ANY for a CPU, where the interpreter runs."""
    if device.type != "cuda":
        return ANY
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"
