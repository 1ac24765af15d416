"""The linear maps of a layer, plain or with a LoRA adapter beside them; those of one input run together.

    y = x W^T                        plain
    y = x W^T + s (x A^T) B^T        with an adapter: kernels/lora.py

For inference `join` makes one product of the maps that share an input, [y_1 | y_2 | ...] = x [W_1; W_2; ...]^T, their weights being views
of one buffer; and on a CPU, where oneDNN has a faster order for that buffer, keeps it in this order alone: the weights are placeholders
then, under their own names and shapes, until `separate` puts them back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harkd.kernels.backend import product_dtype
from harkd.kernels.lora import lora_linear

SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # maps of one input
ROWS = 32  # for which oneDNN orders the weights; other counts run in this order too


@dataclass(frozen=True, eq=False)
class Joined:
    """Maps of one input: their weights one behind the other, [sum of out_i, in], plain or in oneDNN's order."""

    weight: Tensor
    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> list[Tensor]:
        quick = self.weight.is_mkldnn and not x.requires_grad and product_dtype(x) == x.dtype  # oneDNN's product has no gradient
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "") if quick else _product(x, self.weight.to_dense())
        return list(y.split(self.sizes, -1))


class Linear(nn.Linear):
    """y = x W^T.

    Its weight is not drawn, since a checkpoint or `initialise` fills it: drawing on the meta device imports 70 MB of torch for nothing.
    """

    joined: Joined | None = None  # the product that it is a part of, for inference

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class LoraLinear(nn.Linear):
    """A frozen linear map with an adapter of rank r; it keeps the map's weight under its own name, so that checkpoints do not change."""

    def __init__(self, base: nn.Linear, r: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, None
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.zeros(r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **like))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return project(x, [self])[0]


def project(x: Tensor, maps: Sequence[nn.Linear], backend: str = "auto") -> list[Tensor]:
    """What each of the maps makes of the one input x [T, in]: [T, out_i]. Adapters side by side share the reading of x."""
    joined = getattr(maps[0], "joined", None)
    if joined is not None and len(maps) == len(joined.sizes) and all(getattr(linear, "joined", None) is joined for linear in maps):
        return joined(x)
    adapted = [isinstance(linear, LoraLinear) for linear in maps]
    if not all(adapted):
        return [project(x, [one], backend)[0] if has else _product(x, one.weight) for one, has in zip(maps, adapted, strict=True)]
    weights, a, b = ([getattr(linear, name) for linear in maps] for name in ("weight", "lora_A", "lora_B"))
    return lora_linear(x, weights, a, b, maps[0].scale, backend)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's dtype, at the processor's rate where no gradient is to come back: it would keep the copy of the weights."""
    dtype = x.dtype if torch.is_grad_enabled() else product_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def _groups(model: nn.Module) -> Iterator[list[nn.Module | None]]:
    """The maps of one input, of every part of a model; None where the part has no such map."""
    for module in model.modules():
        yield from ([getattr(module, name, None) for name in names] for names in SHARED)


@torch.no_grad()
def join(model: nn.Module) -> nn.Module:
    """Make one product of all plain maps that share an input, in place, for inference; one group at a time is held twice."""
    for maps in _groups(model):
        if all(type(linear) is Linear and linear.joined is None for linear in maps):
            weight, sizes = torch.cat([linear.weight for linear in maps]), tuple(linear.out_features for linear in maps)
            parts = weight.split(sizes)
            if _reorders(weight):
                parts = [part.to("meta") for part in parts]
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            joined = Joined(weight, sizes)
            for linear, part in zip(maps, parts, strict=True):
                linear.weight, linear.joined = nn.Parameter(part, requires_grad=False), joined
    return model


@torch.no_grad()
def separate(model: nn.Module) -> nn.Module:
    """Undo `join`, in place: every weight is its own again, ready to be trained or written."""
    for maps in _groups(model):
        joined = getattr(maps[0], "joined", None)
        if joined is not None:
            for linear, part in zip(maps, joined.weight.to_dense().split(joined.sizes), strict=True):
                linear.weight, linear.joined = nn.Parameter(part.clone()), None
    return model


def _reorders(weight: Tensor) -> bool:
    """Whether oneDNN is here, and computes in this dtype on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
