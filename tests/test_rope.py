"""kernels.rope: the reference against complex numbers, the kernels against the reference in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from harkd.kernels.rope import norm_rope, norm_rope_reference, rotary
from tests.exactness import DTYPES, assert_as_exact, draw, results

EPS = 1e-6
triton_rope, reference = partial(norm_rope, eps=EPS, backend="triton"), partial(norm_rope_reference, eps=EPS)


def tensors(tokens, q_heads, k_heads, size, dtype, trained=True):
    """q, k, both weights, cos and sin, at positions that begin again."""
    positions = torch.arange(tokens) % 7 * 31
    q, k = draw(tokens, q_heads, size, dtype=dtype), draw(tokens, k_heads, size, dtype=dtype, seed=1)
    weights = [draw(size, dtype=dtype, seed=seed, grad=trained) for seed in (2, 3)]
    return [q, k, *weights, *rotary(positions, size, 1e4, dtype)]


def test_the_reference():
    q, k, q_weight, k_weight, cos, sin = tensors(9, 3, 2, 8, torch.float64)
    angles = (torch.arange(9, dtype=torch.float64) % 7 * 31)[:, None] * 1e4 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, D/2]
    for ours, x, weight in zip(norm_rope(q, k, q_weight, k_weight, cos, sin, EPS), (q, k), (q_weight, k_weight), strict=True):
        normed = F.rms_norm(x, (8,), weight, EPS)
        turned = torch.complex(normed[..., :4], normed[..., 4:]) * turns
        torch.testing.assert_close(ours, torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-12)
    inputs = tensors(3, 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(reference, inputs)


def test_angles_are_taken_in_float32():
    positions = torch.tensor([0, 1, 40_000])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cos, sin = rotary(positions, 128, 1e6, dtype)
        assert cos.dtype == sin.dtype == dtype and cos.shape == (3, 1, 64)
        exact = rotary(positions, 128, 1e6, torch.float64)
        assert (torch.complex(cos.double(), sin.double()) - torch.complex(*exact)).abs().max() < torch.finfo(dtype).eps + 5e-3
    assert cos[1, 0, 0] == torch.tensor(1.0).cos() and sin[0].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5, 16, 8, 128), (3, 64, 8, 64), (1, 2, 1, 128), (0, 16, 8, 128), (37, 3, 1, 24)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_as_exact_as_torch(shape, dtype, trained):
    assert_as_exact(triton_rope, reference, tensors(*shape, dtype, trained))


def test_only_one_weight_is_trained():
    inputs = tensors(5, 4, 2, 16, torch.float32)
    both = results(triton_rope, inputs)
    for frozen in (2, 3):
        some = [x.detach().requires_grad_(x.requires_grad and i != frozen) for i, x in enumerate(inputs)]
        for mine, other in zip(results(triton_rope, some), both[: frozen + 2] + both[frozen + 3 :], strict=True):
            assert torch.equal(mine, other)


def test_offsets_beyond_two_billion():
    """Tokens so far apart that int32 would not reach the third; only the pages that are touched take memory."""
    near = tensors(3, 2, 1, 16, torch.float16, trained=False)
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 3, 16), (2**30, 16, 1))
    q, k = far[:, :2].copy_(near[0].detach()), far[:, 2:].copy_(near[1].detach())
    for mine, other in zip(triton_rope(q, k, *near[2:]), triton_rope(*near), strict=True):
        assert torch.equal(mine, other)


def test_columns_of_a_joined_product():
    joined = draw(11, 8 * 16, grad=False)
    q, k = joined[:, : 4 * 16].view(11, 4, 16), joined[:, 4 * 16 : 6 * 16].view(11, 2, 16)
    inputs = [q.requires_grad_(), k.requires_grad_(), *tensors(11, 4, 2, 16, torch.float32)[2:]]
    turned = [draw(2, 11, 16, seed=5, grad=False).transpose(0, 1).requires_grad_(), *inputs[1:]]  # heads that lie apart
    for case in (inputs, turned):
        for mine, other in zip(results(triton_rope, case), results(reference, case), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_strided_weights_and_wide_angles():
    q, k, q_weight, k_weight, _, _ = tensors(5, 3, 1, 16, torch.float16, trained=False)
    angles = rotary(torch.arange(5), 16, 1e4, torch.float32)
    spread = [weight.repeat_interleave(2)[::2] for weight in (q_weight, k_weight)]
    assert not spread[0].is_contiguous()
    for ours, plain in zip(triton_rope(q, k, *spread, *angles), reference(q, k, q_weight, k_weight, *angles), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3)
