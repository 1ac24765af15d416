"""What tools/gpu_kernels.py sets harkd's kernels against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from harkd.kernels.attention import Sequences


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # or the limit of recompilations is reached
    return torch.compile(function, dynamic=False)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of separate sequences, [B, heads, T, D] each."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flex(plan: Sequences) -> Callable:
    """FlexAttention of q, k, v [1, heads, T, D] of a pack whose only prefix, if any, is its first sequence."""
    cu_q = plan.cu_q.long()
    owner = torch.repeat_interleave(torch.arange(len(cu_q) - 1, device=cu_q.device), cu_q.diff())
    shared = plan.prefix_of[owner] >= 0

    def mask(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((owner[i] == owner[j]) & (i >= j)) | (shared[i] & (owner[j] == 0))

    blocks, function = create_block_mask(mask, None, None, len(owner), len(owner), device=cu_q.device.type), compiled(flex_attention)
    return lambda q, k, v: function(q, k, v, block_mask=blocks, enable_gqa=True)


def eager_lora(weights: Sequence[Tensor], scale: float, x: Tensor, *adapters: Tensor) -> list[Tensor]:
    """PEFT's formula in the inputs' dtype, one projection after the other. adapters: all A, then all B."""
    maps = zip(weights, adapters[: len(weights)], adapters[len(weights) :], strict=True)
    return [F.linear(x, w) + F.linear(F.linear(x, a), b) * scale for w, a, b in maps]


def addmm_lora(weights: Sequence[Tensor], scale: float, x: Tensor, *adapters: Tensor) -> Callable[[], list[Tensor]]:
    """Outputs and all gradients, written onto the base products with addmm_, without autograd."""
    maps = list(zip(weights, adapters[: len(weights)], adapters[len(weights) :], strict=True))
    upstream = [torch.randn_like(F.linear(x, w)) for w in weights]

    @torch.no_grad()
    def run() -> list[Tensor]:
        made, dx = [], torch.zeros_like(x)
        for (w, a, b), dy in zip(maps, upstream, strict=True):
            low, ds = x @ a.T, dy @ b
            dx.addmm_(dy, w).addmm_(ds, a, alpha=scale)
            made += [(x @ w.T).addmm_(low, b.T, alpha=scale), (ds.T @ x).mul_(scale), (dy.T @ low).mul_(scale)]
        return [*made, dx]

    return run


def peft_lora(weights: Sequence[Tensor], scale: float, x: Tensor, rank: int) -> Callable[[], object]:
    """Outputs and all gradients of PEFT's own layers in the inputs' dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device(x.device):
        plain = torch.nn.ModuleDict({f"p{i}": torch.nn.Linear(w.shape[1], len(w), bias=False) for i, w in enumerate(weights)})
        names, config = list(plain), LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=list(plain))
        model = inject_adapter_in_model(config, plain).to(x.device, x.dtype)
    x, trained = x.clone().requires_grad_(), [p for p in model.parameters() if p.requires_grad]
    upstream = [torch.randn_like(F.linear(x, w)) for w in weights]
    return lambda: torch.autograd.grad([model[name](x) for name in names], [x, *trained], upstream)


def liger(name: str) -> Callable:
    """A function of Liger's by the name of its autograd class; RMSNorm takes Llama's order of roundings and leaves its inputs alone."""
    from liger_kernel.ops import fused_linear_cross_entropy, rms_norm, swiglu

    found = next(getattr(file, name) for file in (rms_norm, swiglu, fused_linear_cross_entropy) if hasattr(file, name))
    if name == "LigerRMSNormFunction":
        return lambda x, weight, eps: found.apply(x, weight, eps, 0.0, "llama", False)
    return found.apply
