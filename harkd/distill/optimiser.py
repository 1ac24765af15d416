"""AdamW and its learning rate, for any set of parameters.

    g = c grad                                   c = min(1, limit / |grad|), the norm over all parameters at once
    m = b1 m + (1 - b1) g                        v = b2 v + (1 - b2) g^2
    w = w - lr d w                               d = weight decay, on matrices alone; not part of the gradient (decoupled)
    w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

All of it is in float32 (float64 for float64 parameters): m, v, and w itself. A bfloat16 parameter has a float32 master copy w and is its
rounding; without it, updates below 1/512 of a weight would be lost. Sources: arXiv 1412.6980 (Adam), 1711.05101 (AdamW); equal to
torch.optim.AdamW to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
FLOOR = 0.1  # of the peak, where the learning rate ends


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float) -> float:
    """The rate of step 0, 1, ..., total - 1: a linear rise to the peak, then half a cosine down to a tenth of it.

    W = ceil(warmup_fraction * total)
    step < W:   peak * (step + 1) / W
    otherwise:  peak * (0.1 + 0.9 * (1 + cos(pi * (step + 1 - W) / (total - W))) / 2)
    """
    warmup = math.ceil(warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step + 1 - warmup) / (total - warmup))) / 2)


class AdamW:
    """The optimiser's state over named parameters, which it updates in place."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float = 0.0, beta2: float = BETA2) -> None:
        self.parameters = dict(parameters)
        self.weight_decay, self.beta2 = weight_decay, beta2
        self.steps = 0
        # the parameter itself where it is wide already, a copy where it is not
        self.master = {name: _wide(parameter.detach()) for name, parameter in self.parameters.items()}
        self.mean = {name: torch.zeros_like(master) for name, master in self.master.items()}
        self.square = {name: torch.zeros_like(master) for name, master in self.master.items()}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient_norm(self) -> float:
        """The root of the sum of squares of all gradients. ValueError where a parameter has none: it would silently not learn."""
        without = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if without:
            raise ValueError(f"{len(without)} parameters have no gradient, {without[0]} among them")
        squares = [_wide(parameter.grad).square().sum() for parameter in self.parameters.values()]
        return math.sqrt(sum(torch.stack(squares).tolist())) if squares else 0.0

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update with gradients times `scale`."""
        self.steps += 1
        b1, b2, t = BETA1, self.beta2, self.steps
        for name, parameter in self.parameters.items():
            master, mean, square = self.master[name], self.mean[name], self.square[name]
            gradient = _wide(parameter.grad) * scale
            mean.lerp_(gradient, 1 - b1)
            square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            if master.dim() >= 2:
                master.mul_(1 - lr * self.weight_decay)
            master.addcdiv_(mean, (square / (1 - b2**t)).sqrt_().add_(EPSILON), value=-lr / (1 - b1**t))
            if parameter.dtype != master.dtype:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """All but the parameters: mean, square and, of narrow parameters, the master copy, by "kind/name"; and the number of steps."""
        state = {"steps": torch.tensor(self.steps)}
        for name, parameter in self.parameters.items():
            state |= {f"mean/{name}": self.mean[name], f"square/{name}": self.square[name]}
            if parameter.dtype != self.master[name].dtype:
                state[f"master/{name}"] = self.master[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state. ValueError where it belongs to other parameters."""
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("the optimiser's state belongs to other parameters")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = int(state["steps"])


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least; the tensor itself where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
