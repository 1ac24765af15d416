"""kernels.rms_norm: the reference against torch's own norm, the kernels against the reference in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from harkd.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.exactness import DTYPES, assert_as_exact, draw, results

EPS = 1e-6
SHAPES = [(1, 64), (7, 40), (0, 64), (3, 5, 24), (70, 129), (2, 4100)]  # 4,100: a row fills a program; 70 rows of 129: several programs
triton_norm, triton_add_norm = partial(rms_norm, eps=EPS, backend="triton"), partial(add_rms_norm, eps=EPS, backend="triton")


def test_the_reference():
    hidden, x, weight = draw(6, 10, dtype=torch.float64), draw(6, 10, dtype=torch.float64, seed=1), draw(10, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (10,), weight, EPS), rtol=0, atol=1e-14)
    total, normed = add_rms_norm(hidden, x, weight, EPS)
    assert torch.equal(total, hidden + x)
    torch.testing.assert_close(normed, F.rms_norm(hidden + x, (10,), weight, EPS), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(partial(rms_norm_reference, eps=EPS), (x, weight))
    assert torch.autograd.gradcheck(partial(add_rms_norm_reference, eps=EPS), (hidden, x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_as_exact_as_torch(shape, dtype, trained):
    hidden, x, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=dtype, grad=trained)
    assert_as_exact(triton_norm, partial(rms_norm_reference, eps=EPS), [x, weight])
    assert_as_exact(triton_add_norm, partial(add_rms_norm_reference, eps=EPS), [hidden, x, weight])


def test_rounds_as_hugging_face_does():
    """Cast before the weight: another order rounds many entries otherwise."""
    x, weight = draw(64, 48, dtype=torch.float16), draw(48, dtype=torch.float16)
    ours, reference = triton_norm(x, weight), rms_norm_reference(x, weight, EPS)
    other = (F.rms_norm(x.float(), (48,), None, EPS) * weight).half()
    assert (ours == reference).float().mean() > 0.999 and (other == reference).float().mean() < 0.9


def test_inputs_need_not_be_contiguous():
    wide, weight = draw(8, 48, grad=False), draw(24)
    views = [wide[:, 24:].requires_grad_(), wide[:, :24].requires_grad_(), weight]
    ours, theirs = results(triton_add_norm, views), results(partial(add_rms_norm_reference, eps=EPS), views)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_huge_and_empty_rows():
    x = torch.tensor([[0.0, 0.0, 0.0], [3e4, -3e4, 1.0]], dtype=torch.float16)
    torch.testing.assert_close(triton_norm(x, torch.ones(3).half()), rms_norm_reference(x, torch.ones(3).half(), EPS))


def test_strided_weights_and_two_dtypes():
    hidden, x, weight = draw(5, 12, dtype=torch.float32), draw(5, 12, dtype=torch.float16, seed=1), draw(24, dtype=torch.float32, seed=2)[::2]
    torch.testing.assert_close(triton_norm(hidden, weight), rms_norm_reference(hidden, weight, EPS))
    for ours, plain in zip(triton_add_norm(hidden, x, weight), add_rms_norm_reference(hidden, x, weight, EPS), strict=True):
        torch.testing.assert_close(ours, plain)  # compares dtypes too
