"""kernels.lora: the reference against merged weights; the products of a CPU and the Triton backend against the reference in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from harkd.kernels import lora_triton
from harkd.kernels.lora import lora_linear, lora_linear_reference
from tests.exactness import DTYPES, assert_as_exact, draw, results

SCALE = 1.5  # no power of two: multiplying by it rounds


def tensors(rows, depth, outputs, rank, dtype, adapter_dtype=torch.float32):
    """x, the weights, all A, all B, of such sizes that the low-rank part is as large as the base product."""
    x = draw(rows, depth, dtype=dtype)
    weights = [draw(out, depth, dtype=dtype, seed=10 + i, std=depth**-0.5, grad=False) for i, out in enumerate(outputs)]
    a = [draw(rank, depth, dtype=adapter_dtype, seed=20 + i, std=depth**-0.5) for i, _ in enumerate(outputs)]
    b = [draw(out, rank, dtype=adapter_dtype, seed=30 + i, std=rank**-0.5) for i, out in enumerate(outputs)]
    return [x, *weights, *a, *b]


def spread(function, **options):
    """As a function of a flat list of tensors."""

    def call(x, *rest):
        n = len(rest) // 3
        return function(x, rest[:n], rest[n : 2 * n], rest[2 * n :], SCALE, **options)

    return call


reference = spread(lora_linear_reference)


ours = spread(lora_linear, backend="triton")
products = spread(lora_linear)  # on a CPU


def test_the_reference():
    inputs = tensors(5, 6, [7, 3], 2, torch.float64, torch.float64)
    x, w, v, a, c, b, d = inputs
    for y, weight, down, up in zip(spread(lora_linear)(*inputs), (w, v), (a, c), (b, d), strict=True):
        torch.testing.assert_close(y, F.linear(x, weight + SCALE * up @ down), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(reference, inputs) and torch.autograd.gradcheck(products, inputs)


@pytest.mark.parametrize("run", [ours, products])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 65, 256])  # from 65 on the backward pass is torch's products
def test_ranks(rank, dtype, run):
    assert_as_exact(run, reference, tensors(37, 48, [70, 32], rank, dtype))


@pytest.mark.parametrize("run", [ours, products])
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_rows(rows, dtype, run, monkeypatch):
    monkeypatch.setattr(lora_triton, "PROGRAMS", 4)  # several blocks of columns to a program, as in a large launch
    assert_as_exact(run, reference, tensors(rows, 24, [200, 17], 8, dtype))


@pytest.mark.parametrize("knows", [True, False])
def test_half_precision_on_any_processor(knows, monkeypatch):
    monkeypatch.setattr("harkd.kernels.backend._multiplies", lambda dtype: knows)
    assert_as_exact(products, reference, tensors(70, 24, [40, 17], 8, torch.float16))


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_spans_of_columns_change_nothing_but_roundings(programs, monkeypatch):
    inputs = tensors(150, 24, [133], 8, torch.float32)
    monkeypatch.setattr(lora_triton, "PROGRAMS", programs)
    assert_as_exact(ours, reference, inputs)


def test_ranks_may_differ_and_adapters_be_half():
    inputs = tensors(9, 24, [20, 12], 4, torch.float16, torch.float16)
    inputs[3], inputs[5] = draw(3, 24, std=0.2), draw(20, 3)
    assert [x.dtype for x in results(ours, inputs)[-4:]] == [torch.float32, torch.float16] * 2
    assert_as_exact(ours, reference, inputs)


def test_an_untrained_adapter_changes_nothing():
    x, w, a, b = tensors(9, 24, [20], 4, torch.float16)
    for backend in ("triton", "auto"):
        assert torch.equal(lora_linear(x, [w], [a], [torch.zeros_like(b)], SCALE, backend)[0], F.linear(x, w))


def test_trained_weights_get_their_gradients_too():
    x, w, a, b = tensors(9, 24, [20], 4, torch.float64, torch.float64)
    w.requires_grad_()
    for mine, theirs in zip(results(products, [x, w, a, b]), results(reference, [x, w, a, b]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_needs_no_gradient_gets_none():
    inputs = tensors(9, 24, [20], 4, torch.float32)
    frozen = [inputs[0].detach(), *inputs[1:]]
    for run in (ours, products):
        both = results(run, inputs)
        for mine, other in zip(results(run, frozen), [both[0], *both[2:]], strict=True):
            assert torch.equal(mine, other)
        with torch.no_grad():
            assert not run(*inputs)[0].requires_grad


def test_views_and_broadcast_gradients():
    wide = draw(9, 48, grad=False)
    x, w, a, b = tensors(9, 24, [20], 4, torch.float32)
    inputs = [wide[:, 24:].requires_grad_(), w.repeat(1, 2)[:, :24], a, b]
    run = partial(results, inputs=inputs)
    for mine, other in zip(*map(run, [lambda *t, f=f: f(*t)[0].sum() for f in (ours, reference)]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_mistakes():
    x, w, a, b = tensors(9, 24, [20], 4, torch.float32)
    with pytest.raises(ValueError, match="freeze"):
        lora_linear(x, [w.requires_grad_()], [a], [b], SCALE, "triton")
    with pytest.raises(ValueError, match="backend"):
        lora_linear(x, [w.detach()], [a], [b], SCALE, "cuda")
