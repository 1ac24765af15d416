"""The switch between Triton and the reference, the table of tiles, and that nobody waits for triton who does not use it."""

import subprocess
import sys

import pytest
import torch

from harkd.kernels import backend
from harkd.kernels.backend import product_dtype, use_triton
from harkd.kernels.tiles import ANY, TILES, gpu_family, tile_for
from tests.helpers import ROOT

MODULES = [f"harkd.kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("*.py"))]
TRITON_ONLY = {name for name in MODULES if "\nimport triton" in (ROOT / "kernels" / f"{name.rpartition('.')[2]}.py").read_text(encoding="utf-8")}


class OnGpu:
    is_cuda, dtype = True, torch.float32


class WideOnGpu(OnGpu):
    dtype = torch.float64


def test_the_switch(monkeypatch):
    cpu = torch.zeros(1)
    assert not use_triton("auto", cpu) and not use_triton("torch", cpu) and not use_triton("torch", OnGpu())
    assert use_triton("triton", cpu) and use_triton("triton", OnGpu()) and use_triton("auto", OnGpu()) and not use_triton("auto", OnGpu(), cpu)
    assert not use_triton("auto", OnGpu(), WideOnGpu())
    with pytest.raises(ValueError, match='backend is "auto", "torch" or "triton"'):
        use_triton("cuda", cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert use_triton("triton", OnGpu())
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        use_triton("triton", cpu)


def test_half_precision_is_multiplied_in_float32_where_the_processor_does_not_know_it(monkeypatch):
    many, few = torch.zeros(64, 3, dtype=torch.bfloat16), torch.zeros(63, 3, dtype=torch.bfloat16)
    for knows, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(backend, "_multiplies", lambda dtype, knows=knows: knows or dtype == torch.float64)
        assert product_dtype(many) == dtype and product_dtype(few) == torch.bfloat16 and product_dtype(many.to("meta")) == torch.bfloat16
        assert product_dtype(many.double()) == torch.float64
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert backend._multiplies.__wrapped__(torch.float32) and not backend._multiplies.__wrapped__(torch.bfloat16)


def test_without_triton(monkeypatch):
    backend._installed.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        assert not use_triton("auto", OnGpu())
        with pytest.raises(ValueError, match="not installed"):
            use_triton("triton", OnGpu())
    finally:
        backend._installed.cache_clear()


def test_nobody_waits_for_triton():
    """What imports it is imported at first use; the rest can be imported where it is not installed."""
    assert len(TRITON_ONLY) >= 2
    others = ", ".join(name for name in MODULES if name not in TRITON_ONLY)
    code = f"import sys; sys.modules['triton'] = None; import {others}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kernel_has_a_tile_on_every_gpu():
    for kernel, size, _ in TILES:
        for gpu in (ANY, "sm75", "sm90", "sm120", "gfx1201"):
            assert tile_for(kernel, size, gpu).warps in (1, 2, 4, 8, 16)
    assert TILES["packed_forward", 128, "sm90"] == tile_for("packed_forward", 128, "sm90") != tile_for("packed_forward", 128, "sm89")
    assert tile_for("packed_forward", 16, "sm89") == TILES["packed_forward", 0, ANY]
    with pytest.raises(KeyError, match="no tile"):
        tile_for("nonsense", 1, ANY)
    assert gpu_family(torch.device("cpu")) == ANY
