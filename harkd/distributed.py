"""The processes that train together, one per GPU: `torchrun --nproc-per-node N -m harkd.train ...`.

Every process holds the model and the whole plan, takes each N-th pack of a step, and divides its losses by counts over all of them. Their
gradients add up, in float32 at least, to those of one process that ran over all packs: no mean of means is taken. The sum comes out with
the same bits everywhere, and so the parameters stay alike. The first process alone writes; what it wrote must be readable by the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harkd.errors import UserError
from harkd.qwen3.weights import as_device


@dataclass(frozen=True)
class World:
    """This process's number, how many there are, and its device."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def share(self, items: Sequence) -> Sequence:
        """This process's part of what is divided among all."""
        return items[self.rank :: self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all processes, place by place."""
        return self._sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist() if self.size > 1 else list(values)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients over all processes; one that had no pack adds nothing."""
        for parameter in parameters if self.size > 1 else ():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._sum(gradient.to(torch.promote_types(gradient.dtype, torch.float32))).to(gradient.dtype)

    def _sum(self, tensor: Tensor) -> Tensor:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            what = f"another process of this run was lost ({str(error).splitlines()[0]})"
            raise UserError(f"{what}: start all of them again, and the run goes on from its last checkpoint") from None
        return tensor


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Meet the other processes that torchrun started, alone where it started none: NCCL on GPUs, one each, and Gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=str(as_device(device)))
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device in (None, "cuda") and torch.cuda.is_available() else device
    place = as_device(own)
    waits = timedelta(hours=2)  # while the first process alone asks the teacher or writes for F1; a lost one is told at once
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=waits)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), str(place))
    finally:
        dist.destroy_process_group()
