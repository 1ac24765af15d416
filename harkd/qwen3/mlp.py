"""The MLP of a layer, and the mixture of experts that stands in its place in Qwen3-30B-A3B and 235B-A22B.

    MLP      y = down(silu(gate(x)) * up(x))                                            (SwiGLU, arXiv 2002.05202)
    experts  p = softmax(x W^T) [T, E] in float32;  of each token the k experts of largest p, those p divided by their sum where the
             config says so;  y = sum over them of p_e MLP_e(x)                         (arXiv 1701.06538)

The T x k pairs of token and expert are sorted by expert, so that each expert is one product over all of its tokens. A token's k results are
summed in the order of falling p, whatever else is in the pack.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harkd.kernels.swiglu import swiglu
from harkd.qwen3.config import Qwen3MoeConfig
from harkd.qwen3.linear import Linear, project


class MLP(nn.Module):
    """Of C to C by way of `width`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor, backend: str) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj), backend)
        return project(swiglu(gate, up, backend), [self.down_proj], backend)[0]


class Experts(nn.Module):
    """A router and E MLPs, of which each token passes through k."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.chosen, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, x: Tensor, backend: str) -> Tensor:
        logits = self.gate(x)
        p, experts = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).topk(self.chosen)  # [T, k]
        p = (p / p.sum(-1, keepdim=True) if self.normalised else p).to(x.dtype)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        order = experts.flatten().argsort(stable=True)  # [T k] pairs, expert by expert
        parts = (x[order // self.chosen]).split(counts)  # of each expert [n, C]
        results = torch.cat([expert(part, backend) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        paired = torch.empty_like(results).index_copy_(0, order, results).view(len(x), self.chosen, -1)  # [T, k, C]
        return (paired * p[..., None]).sum(1)
