"""kernels.swiglu: the reference against the formula, the kernels against the reference in float64."""

from functools import partial

import pytest
import torch

from harkd.kernels.swiglu import swiglu, swiglu_reference
from tests.exactness import DTYPES, assert_as_exact, draw, results

triton_swiglu = partial(swiglu, backend="triton")


def pair(rows, width, dtype):
    return [draw(rows, width, dtype=dtype, std=3), draw(rows, width, dtype=dtype, seed=1)]


def test_the_reference():
    gate, up = pair(5, 6, torch.float64)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (9, 40), (0, 64), (3, 2500), (5, 1)])  # 2,500: several programs to a row
def test_as_exact_as_torch(shape, dtype):
    assert_as_exact(triton_swiglu, swiglu_reference, pair(*shape, dtype))


def test_rounds_as_hugging_face_does():
    """silu in the dtype, then the product: one rounding at the end gives many other entries."""
    gate, up = pair(64, 48, torch.float16)
    ours, reference = triton_swiglu(gate, up), swiglu_reference(gate, up)
    other = swiglu_reference(gate.float(), up.float()).half()
    assert (ours == reference).float().mean() > 0.999 and (other == reference).float().mean() < 0.9


def test_halves_of_a_joined_product():
    joined = draw(7, 80, grad=False)
    halves = [half.requires_grad_() for half in (joined[:, :40], joined[:, 40:])]
    for mine, other in zip(results(triton_swiglu, halves), results(swiglu_reference, halves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_two_billion():
    """Rows so far apart that int32 would not reach the third; only the pages that are touched take memory."""
    gate = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 40), (2**30, 1))
    up = draw(3, 40, dtype=torch.float16, grad=False)
    gate.copy_(draw(3, 40, seed=1, grad=False))
    assert torch.equal(triton_swiglu(gate, up), triton_swiglu(gate.contiguous(), up))


def test_large_gates():
    gate, up = torch.tensor([[-80.0, -20.0, 0.0, 100.0, 6e4]]).half().requires_grad_(), torch.ones(1, 5).half().requires_grad_()
    for mine, other in zip(results(triton_swiglu, [gate, up]), results(swiglu_reference, [gate, up]), strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("up", [torch.ones(2, 3, 4), torch.ones(3, 5), torch.ones(3, 4, dtype=torch.float16)], ids=["3 axes", "width", "dtype"])
def test_what_the_kernel_cannot_take(up):
    with pytest.raises(ValueError, match="gate and up are"):
        triton_swiglu(torch.ones(up.shape if up.dim() == 3 else (3, 4)), up)
