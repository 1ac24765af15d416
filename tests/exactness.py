"""How exact a kernel must be: its largest error against the reference in float64 is at most twice that of the reference in the same dtype,
plus a floor below 1% of the signal. A result of zeros, and one with a single entry wrong by 5% of the signal, must fail the same bound.
"""

import contextlib

import torch

FLOOR = {torch.float32: 1e-6, torch.float16: 2e-3}  # of the signal's rms
DTYPES = [torch.float32, torch.float16]


@contextlib.contextmanager
def poisoned():
    """New memory is NaN, so that an entry that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, dtype=torch.float16).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=torch.float32, seed=0, grad=True, std=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype).requires_grad_(grad)


def results(function, inputs, dtype=None):
    """All outputs, and the gradients of those inputs that want one under random gradients of the outputs; in `dtype` where one is given."""
    inputs = [(x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_(x.requires_grad) for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    wanted = [x for x in inputs if x.requires_grad]
    upstream = [draw(*out.shape, seed=17 + i, grad=False).half().to(out.dtype) for i, out in enumerate(outputs)]
    return [out.detach() for out in outputs] + (list(torch.autograd.grad(outputs, wanted, upstream)) if wanted else [])


def assert_as_exact(kernel, reference, inputs):
    """Outputs and gradients of `kernel`, of these inputs, are as exact as those of `reference`, and the same in a second run."""
    with poisoned():
        ours, again = results(kernel, inputs), results(kernel, inputs)
    plain, truth = results(reference, inputs), results(reference, inputs, torch.float64)
    assert len(ours) == len(plain) > sum(x.requires_grad for x in inputs)
    for i, (mine, second, theirs, exact) in enumerate(zip(ours, again, plain, truth, strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.equal(mine, second), f"result {i} differs from run to run"
        if not inputs[0].numel():
            assert not mine.any(), f"result {i} of no rows"
            continue
        rms, floor = exact.square().mean().sqrt(), FLOOR[next(x.dtype for x in inputs)]
        bound = 2 * (theirs - exact).abs().max() + floor * rms
        assert floor < 0.01 and rms > 0

        def passes(x, exact=exact, bound=bound):
            return bool((x - exact).abs().max() <= bound)

        assert passes(mine), f"result {i}: error {(mine - exact).abs().max():.2e}, allowed {bound:.2e}"
        perturbed = mine.double()
        perturbed.view(-1)[-1] += 0.05 * rms
        assert not passes(torch.zeros_like(mine)) and not passes(perturbed), f"result {i}: the bound {bound:.2e} lets wrong results pass"
