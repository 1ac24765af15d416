"""AdamW against torch's, and what a float32 master copy is for."""

import math

import pytest
import torch
from torch import nn

from harkd.distill.optimiser import AdamW, learning_rate


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (5, 3), "norm": (4,), "scalar": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for name, shape in shapes.items()}


def draw_gradients(named, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype) * 10.0 ** (step % 5 - 3)


def torch_adamw(named, weight_decay, lr=1e-2, beta2=0.999):
    matrices = [p for p in named.values() if p.dim() >= 2]
    others = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("weight_decay", "others"), [(0.0, {}), (0.3, {}), (0.3, {"beta2": 0.95})])
def test_it_equals_torch_over_50_steps(dtype, tolerance, weight_decay, others):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimiser, reference = AdamW(ours, weight_decay, **others), torch_adamw(theirs, weight_decay, **others)
    for step in range(50):
        draw_gradients(ours, step)
        draw_gradients(theirs, step)
        lr = 1e-2 * (1 + step % 7)
        for group in reference.param_groups:
            group["lr"] = lr
        optimiser.step(lr)
        reference.step()
    start = parameters(dtype)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
        assert (ours[name] - start[name]).abs().min() > 100 * tolerance


def test_narrow_parameters_move_by_updates_that_bfloat16_would_lose():
    narrow, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = {name: nn.Parameter(p.detach().float()) for name, p in wide.items()}
    start = {name: p.detach().clone() for name, p in narrow.items()}
    optimiser, reference = AdamW(narrow), AdamW(wide)
    for _ in range(400):
        for named in (narrow, wide):
            for p in named.values():
                p.grad = torch.ones_like(p)
        optimiser.step(1e-4)  # one such step is below half a unit of bfloat16 at any weight above 0.05
        reference.step(1e-4)
    for name, p in narrow.items():
        assert p.dtype == torch.bfloat16 and optimiser.mean[name].dtype == torch.float32
        assert torch.equal(p, wide[name].bfloat16())
        moved = (start[name].float() - p.float())[start[name].abs() > 0.1]
        assert torch.all((moved - 0.04).abs() < 0.01)
        assert torch.equal(start[name] - 1e-4, start[name]) or start[name].abs().min() < 0.05  # pure bfloat16 stands still


def test_the_gradient_norm_is_taken_wide_and_scaling_clips_to_it():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    draw_gradients(ours, 3)
    draw_gradients(theirs, 3)
    optimiser, reference = AdamW(ours), torch_adamw(theirs, 0.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5).item()
    norm = optimiser.gradient_norm()
    assert norm == pytest.approx(expected, rel=1e-12)
    optimiser.step(1e-2, scale=0.5 / norm)
    reference.step()
    for name in ours:
        mean = reference.state[theirs[name]]["exp_avg"]
        torch.testing.assert_close(optimiser.mean[name], mean, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm
    big = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    big.grad = torch.full_like(big, 0.1)
    assert AdamW({"big": big}).gradient_norm() == pytest.approx(64 * float(torch.tensor(0.1).bfloat16()), rel=1e-5)


def test_a_parameter_without_gradient_is_named():
    named = parameters(torch.float32)
    draw_gradients(named, 0)
    named["norm"].grad = None
    with pytest.raises(ValueError, match="1 parameters have no gradient, norm"):
        AdamW(named).gradient_norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_state_continues_to_the_bit(dtype):
    straight = parameters(dtype)
    optimiser = AdamW(straight, 0.1)
    for step in range(6):
        draw_gradients(straight, step)
        optimiser.step(1e-3)
        if step == 2:
            state = {name: tensor.clone() for name, tensor in optimiser.state_dict().items()}
            values = {name: p.detach().clone() for name, p in straight.items()}
    continued = {name: nn.Parameter(value) for name, value in values.items()}
    optimiser = AdamW(continued, 0.1)
    optimiser.load_state_dict(state)
    for step in range(3, 6):
        draw_gradients(continued, step)
        optimiser.step(1e-3)
    assert optimiser.steps == 6 and all(torch.equal(continued[name], straight[name]) for name in straight)
    with pytest.raises(ValueError, match="other parameters"):
        AdamW({"matrix": continued["matrix"]}).load_state_dict(state)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == 2.0 and rates[-1] == pytest.approx(0.2)
    assert all(before > after for before, after in zip(rates[9:], rates[10:], strict=False))
    assert rates[54] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert learning_rate(0, 1, 2.0, 0.0) == pytest.approx(0.2) and learning_rate(0, 1, 2.0, 0.05) == 2.0
    assert all(learning_rate(step, 3, 2.0, 1.0) == pytest.approx(2.0 * (step + 1) / 3) for step in range(3))
