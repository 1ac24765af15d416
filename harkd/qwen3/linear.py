"""The linear maps of a layer, plain or with a LoRA adapter beside them; those of one input run together.

    y = x W^T                        plain
    y = x W^T + s (x A^T) B^T        with an adapter: kernels/lora.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harkd.kernels.lora import lora_linear


class Linear(nn.Linear):
    """y = x W^T.

    Its weight is not drawn, since a checkpoint or `initialise` fills it: drawing on the meta device imports 70 MB of torch for nothing.
    """

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
    adapted = [isinstance(linear, LoraLinear) for linear in maps]
    if not all(adapted):
        return [project(x, [one], backend)[0] if has else F.linear(x, one.weight) for one, has in zip(maps, adapted, strict=True)]
    weights, a, b = ([getattr(linear, name) for linear in maps] for name in ("weight", "lora_A", "lora_B"))
    return lora_linear(x, weights, a, b, maps[0].scale, backend)
