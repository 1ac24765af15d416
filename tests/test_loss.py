"""kernels.loss against torch's cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from harkd.kernels import loss
from harkd.kernels.loss import cross_entropy
from tests.loss_cases import Peak, rms

HEAD_KINDS = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])


def draw(rows, width, vocab, trained, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = (torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.5 * 3).to(dtype).requires_grad_(trained)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden, head, targets


def truth(hidden, head, targets, weights, vocab_size=None):
    """Losses and the gradients of their weighted sum, from torch in float64."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    losses = F.cross_entropy((hidden @ head.T)[:, :vocab_size], targets, reduction="none")
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), [hidden, head])


@HEAD_KINDS
@pytest.mark.parametrize("rows", [1, 7, 8, 20])
@pytest.mark.parametrize("chunk", [1, 3, 8, 512])
def test_losses_and_gradients(trained, rows, chunk):
    hidden, head, targets = draw(rows, 12, 50, trained)
    weights = torch.rand(rows, dtype=torch.float64)
    expected, hidden_gradient, head_gradient = truth(hidden, head, targets, weights)
    losses = cross_entropy(hidden, head, targets, chunk=chunk)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=0, atol=1e-12)
    assert head.grad is None if not trained else torch.allclose(head.grad, head_gradient, rtol=0, atol=1e-12)
    for wrong in (torch.zeros_like(expected), expected + 1e-9, losses.roll(1) if rows > 1 else -losses):
        assert not torch.allclose(wrong, expected, rtol=0, atol=1e-12)


@HEAD_KINDS
def test_padding_of_the_vocabulary_gets_no_probability(trained):
    hidden, head, targets = draw(9, 12, 50, trained)
    targets = targets % 41
    expected, hidden_gradient, head_gradient = truth(hidden, head, targets, torch.ones(9), 41)
    losses = cross_entropy(hidden, head, targets, vocab_size=41, chunk=4)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=0, atol=1e-12)
    assert not torch.allclose(losses, cross_entropy(hidden, head, targets), atol=1e-6)
    if trained:
        torch.testing.assert_close(head.grad, head_gradient, rtol=0, atol=1e-12)
        assert not head.grad[41:].any() and head.grad[:41].any()


@HEAD_KINDS
def test_no_rows(trained):
    hidden, head, targets = draw(0, 12, 50, trained, torch.float32)
    losses = cross_entropy(hidden, head, targets)
    losses.sum().backward()
    assert losses.shape == (0,) and losses.dtype == torch.float32 and hidden.grad.shape == (0, 12)


@HEAD_KINDS
def test_gradcheck(trained):
    hidden, head, targets = draw(3, 2, 5, trained)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, chunk=2), (hidden, head))


@HEAD_KINDS
def test_without_gradients(trained):
    hidden, head, targets = draw(5, 12, 50, trained)
    with torch.no_grad():
        losses = cross_entropy(hidden, head, targets, chunk=2)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, truth(hidden, head, targets, torch.ones(5))[0], rtol=0, atol=1e-12)


def test_the_frozen_path_refuses_a_second_derivative():
    hidden, head, targets = draw(5, 12, 50, False)
    (gradient,) = torch.autograd.grad(cross_entropy(hidden, head, targets).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        gradient.sum().backward()


@HEAD_KINDS
def test_full_vocabulary_in_float32(trained):
    hidden, head, targets = draw(5, 16, 151_936, trained, torch.float32)
    weights = torch.rand(5)
    expected, hidden_gradient, head_gradient = truth(hidden, head, targets, weights)
    losses = cross_entropy(hidden, head, targets, chunk=2)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    # a float32 product over 151,936 terms is itself exact to about 4e-5
    assert rms(hidden.grad - hidden_gradient) < 2e-4 * rms(hidden_gradient)
    if trained:
        assert rms(head.grad - head_gradient) < 1e-5 * rms(head_gradient)


@HEAD_KINDS
def test_bfloat16_is_as_exact_as_torch(trained):
    hidden, head, targets = draw(64, 64, 3000, trained, torch.bfloat16)
    expected = truth(hidden, head, targets, torch.ones(64))
    losses = cross_entropy(hidden, head, targets, chunk=24)
    losses.sum().backward()
    peer = [x.detach().clone().requires_grad_() for x in (hidden, head)]
    peer_losses = F.cross_entropy(F.linear(*peer).float(), targets, reduction="none")
    peer_losses.sum().backward()
    ours = [losses, hidden.grad] + ([head.grad] if trained else [])
    for mine, theirs, exact in zip(ours, [peer_losses, *(x.grad for x in peer)], expected, strict=False):
        error, bound = rms(mine.double() - exact), rms(theirs.double() - exact)
        print(f"bf16 error {error / bound:.2f} x torch's")
        assert 0 < bound and error <= 1.5 * bound and rms(exact) > 20 * error


class Shapes(TorchDispatchMode):
    """Every shape that an operation gives, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        views = "view" in str(function) or "detach" in str(function) or "slice" in str(function) or "aten.t." in str(function)
        self.seen |= {tuple(x.shape) for x in made if isinstance(x, torch.Tensor) and not views}
        return out


@HEAD_KINDS
def test_what_is_never_made(trained, monkeypatch):
    """No tensor of the head's shape where the head is frozen, and nowhere the logits of all rows."""
    monkeypatch.setattr(loss, "CPU_TILE", 16 * 150)
    hidden, head, targets = draw(40, 12, 500, trained, torch.float32)
    with Shapes() as shapes:
        cross_entropy(hidden, head, targets, chunk=16).sum().backward()
    made = {(16, 500), (8, 500)} if trained else {(16, 150), (16, 50), (8, 300), (8, 200)}
    assert made <= shapes.seen and (40, 500) not in shapes.seen
    assert ((500, 12) in shapes.seen or (12, 500) in shapes.seen) == trained


@pytest.mark.parametrize("tile", [1, 6, 7 * 13, 10**9])
@pytest.mark.parametrize("vocab", [1, 2, 50])
def test_tiles_of_the_vocabulary(tile, vocab, monkeypatch):
    """The same losses and gradients however the vocabulary is cut, also where a tile holds nothing but the target."""
    monkeypatch.setattr(loss, "CPU_TILE", tile)
    hidden, head, targets = draw(7, 12, vocab, False)
    targets[:2] = torch.tensor([0, vocab - 1])
    expected, gradient, _ = truth(hidden, head, targets, torch.ones(7))
    losses = cross_entropy(hidden, head, targets)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, gradient, rtol=0, atol=1e-12)


def test_certain_and_hopeless_targets(monkeypatch):
    """Where the target is nearly certain the gradient is small and still right; where it is hopeless nothing overflows."""
    monkeypatch.setattr(loss, "CPU_TILE", 3 * 16)
    head = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 20, 49])
    for scale in (2.0, 5.0, -300.0):
        hidden = (scale * head[targets]).requires_grad_()
        exact = hidden.detach().double().requires_grad_()
        logits = exact @ head.double().T  # torch's own cross-entropy in float64 is too coarse here: it takes a difference
        rest = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
        expected = F.softplus(rest - logits.gather(1, targets[:, None])[:, 0], threshold=50)
        (gradient,) = torch.autograd.grad(expected.sum(), exact)
        losses = cross_entropy(hidden, head, targets)
        losses.sum().backward()
        torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-30)
        assert all(rms(mine - exact) < 1e-4 * rms(exact) for mine, exact in zip(hidden.grad, gradient, strict=True))


def test_targets_outside_the_vocabulary():
    hidden, head, _ = draw(2, 12, 50, False)
    for wrong in (-100, 41, 50):
        with pytest.raises(IndexError, match="vocabulary of 41"):
            cross_entropy(hidden, head, torch.tensor([3, wrong]), vocab_size=41)


def test_memory_of_the_forward_pass(monkeypatch):
    """Far below the logits of all rows: tiles, and rows of the head's width."""
    monkeypatch.setattr(loss, "CPU_TILE", 2**18)
    hidden, head, targets = draw(40, 8, 151_936, False, torch.float32)
    with Peak() as peak:
        cross_entropy(hidden, head, targets)
    tile = 4 * loss.CPU_TILE
    assert tile / 2 < peak.most < 4 * tile < 40 * 151_936 * 4 / 5, peak.most / tile
