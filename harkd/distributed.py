"""The processes that work together, one per GPU: `torchrun --nproc-per-node N -m harkd.train ...`, and harkd.generate.

In training every process holds the model and the whole plan, takes each N-th pack of a step, and divides its losses by counts over all of
them. Their gradients add up, in float32 at least, to those of one process that ran over all packs: no mean of means is taken. The sum comes
out with the same bits everywhere, and so the parameters stay alike. The first process alone writes; what it wrote must be readable by the
others. In generation neighbours make a team that holds one model (qwen3/parallel.py), and the teams share the windows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harkd.errors import UserError

_WAITS = timedelta(days=1)  # while the first process works alone, or one team longer than another; a lost one is told at once


@dataclass(frozen=True)
class World:
    """This process's number, how many there are, its device, and torch's name for those processes, None for all that were started."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    group: dist.ProcessGroup | None = None

    def share(self, items: Sequence) -> Sequence:
        """This process's part of what is divided among all."""
        return items[self.rank :: self.size]

    def team(self, size: int) -> World:
        """The `size` neighbours to whom this process belongs. Raises UserError where all cannot be divided so."""
        if self.size % size:
            start = f"start {size}, or a multiple, with torchrun --nproc-per-node"
            raise UserError(f"{size} processes are to hold a model together, and {self.size} cannot be divided so: {start}")
        group = dist.new_subgroups(size, timeout=_WAITS)[0] if size > 1 else None
        return World(self.rank % size, size, self.device, group)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all processes, place by place. Nobody goes on before all have come here."""
        return self.add(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist() if self.size > 1 else list(values)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients over all processes; one that had no pack adds nothing."""
        for parameter in parameters if self.size > 1 else ():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.add(gradient.to(torch.promote_types(gradient.dtype, torch.float32))).to(gradient.dtype)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in its place."""
        return self._meet(dist.all_reduce, tensor)

    def first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in the place of every other's."""
        return self._meet(dist.broadcast, tensor, group_src=0)

    def _meet(self, exchange: Callable, tensor: Tensor, **how: int) -> Tensor:
        try:
            if self.size > 1:
                exchange(tensor, group=self.group, **how)
        except RuntimeError as error:
            what = f"another process of this run was lost ({str(error).splitlines()[0]})"
            raise UserError(f"{what}: start all of them again, and the run goes on from what is on the disk") from None
        return tensor


@contextmanager
def join(device: str | None = None) -> Iterator[World]:
    """Meet the other processes that torchrun started, alone where it started none: NCCL on GPUs, one each, and Gloo elsewhere."""
    from harkd.qwen3.weights import as_device

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=str(as_device(device)))
        return
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device in (None, "cuda") and torch.cuda.is_available() else device
    place = as_device(own)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # of what NCCL and graphs do
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=_WAITS)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), str(place))
    finally:
        dist.destroy_process_group()
