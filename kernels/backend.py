"""The one switch between a Triton kernel and the plain PyTorch reference beside it, and the dtype in which a CPU multiplies.

`import triton` takes 0.2 s, which a CPU run need not pay: Triton code lies in modules that are imported at their first use, behind this
switch, and nothing else imports triton. So everything can be imported, and runs on the reference, where triton is not installed.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

WIDENED = 64  # rows of half precision, from which a copy of the weights in float32 pays


def use_triton(backend: str, *tensors: Tensor) -> bool:
    """Whether to run the Triton kernel on these tensors rather than the reference.

    "auto": if they lie on a GPU, none is float64, and triton is installed; "torch": never; "triton": always, on a CPU by Triton's
    interpreter.
    Raises ValueError for another word, and where "triton" cannot be had.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend is "auto", "torch" or "triton", not {backend!r}')
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if backend != "triton":
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)  # the kernels sum in float32
        return backend == "auto" and on_gpu and not wide and _installed()
    if not _installed():
        raise ValueError('backend "triton" needs the package triton, which is not installed')
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('backend "triton" needs tensors on a GPU, or TRITON_INTERPRET=1 in the environment before triton is imported')
    return True


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x [n, C] with weights run at the processor's rate: its own, or float32 where it is half precision on a
    CPU without instructions for that (a quarter of the rate, or less), and its rows repay a copy of the weights.
    """
    wide = x.device.type == "cpu" and len(x) >= WIDENED and not _multiplies(x.dtype)
    return torch.float32 if wide else x.dtype


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in this dtype, and torch uses them."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if platform.machine().lower() in ("x86_64", "amd64"):  # where oneDNN would say yes, and emulate
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
