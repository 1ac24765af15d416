"""kernels.divergence against definitions in float64, its own limits, and a teacher stored as top-k."""

import pytest
import torch
import torch.nn.functional as F

from harkd.kernels.divergence import KINDS, divergence, divergence_to_top_k
from tests.loss_cases import Peak, rms

every_kind = pytest.mark.parametrize("kind", KINDS)
HEAD_KINDS = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])

SIZES = pytest.mark.parametrize(("rows", "vocab"), [(9, 31), (2, 151_936)])


def draw(rows, vocab, trained=False, dtype=torch.float64, width=6, teacher_width=9, seed=0):
    """A student's rows and head and a teacher's, of another width."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (vocab, width), (rows, teacher_width), (vocab, teacher_width)
    hidden, head, *teacher = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return hidden.requires_grad_(), head.requires_grad_(trained), *teacher


def definition(kind, student, teacher, beta=0.5, temperature=1.0):
    """From the formulas, in float64, over logits [N, V]."""
    q, p = (logits.double().div(temperature).softmax(-1) for logits in (student, teacher))

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    middle = beta * p + (1 - beta) * q
    values = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, middle) + (1 - beta) * kl(q, middle)}
    return values[kind] * temperature**2


def truth(kind, hidden, head, teacher_hidden, teacher_head, weights, **settings):
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    values = definition(kind, hidden @ head.T, teacher_hidden.double() @ teacher_head.double().T, **settings)
    return values.detach(), *torch.autograd.grad((values * weights).sum(), [hidden, head])


@HEAD_KINDS
@every_kind
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("temperature, beta", [(1.0, 0.5), (2.5, 0.1)])
def test_values_and_gradients(kind, trained, chunk, temperature, beta):
    inputs, weights = draw(7, 23, trained), torch.rand(7, dtype=torch.float64)
    expected, hidden_gradient, head_gradient = truth(kind, *inputs, weights, beta=beta, temperature=temperature)
    values = divergence(*inputs, kind, beta, temperature, chunk=chunk)
    (values * weights).sum().backward()
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, hidden_gradient, rtol=0, atol=1e-12)
    assert inputs[1].grad is None if not trained else torch.allclose(inputs[1].grad, head_gradient, rtol=0, atol=1e-12)
    others = [definition(other, inputs[0] @ inputs[1].T, inputs[2] @ inputs[3].T, beta, temperature) for other in KINDS if other != kind]
    for wrong in (torch.zeros_like(expected), expected * (1 + 1e-6), expected / temperature**2 + (temperature == 1), *others):
        assert not torch.allclose(wrong, expected, rtol=0, atol=1e-9)


@HEAD_KINDS
@every_kind
def test_gradcheck(kind, trained):
    hidden, head, *teacher = draw(3, 5, trained, width=2)
    ids, logprobs = (teacher[0] @ teacher[1].T).log_softmax(-1).topk(2)[::-1]
    assert torch.autograd.gradcheck(lambda h, w: divergence(h, w, *teacher, kind, 0.3, 1.7, chunk=2), (hidden, head))
    assert torch.autograd.gradcheck(lambda h, w: divergence_to_top_k(h, w, ids, logprobs, kind, 0.3, 1.7, chunk=2), (hidden, head))


@SIZES
@every_kind
def test_zero_at_equality_and_nowhere_else(kind, rows, vocab):
    hidden, head, *_ = draw(rows, vocab)
    same = divergence(hidden, head, hidden, head, kind)
    assert same.abs().max() < 1e-14
    assert torch.autograd.grad(same.sum(), hidden)[0].abs().max() < 1e-14
    # logits are compared by what they say: a constant more is the same distribution
    wider = torch.cat([hidden, torch.ones(rows, 1)], 1), torch.cat([head, torch.full((vocab, 1), 3.0)], 1)
    assert divergence(hidden, head, *wider, kind).abs().max() < 1e-13
    for seed in range(20 if vocab < 100 else 1):
        assert divergence(*draw(rows, vocab, seed=seed), kind).min() > 1e-3


@SIZES
def test_limits_of_jsd(rows, vocab):
    inputs = [x.detach() / 3**0.5 for x in draw(rows, vocab)]  # at larger logits P / Q times the small share is not small everywhere
    forward, reverse = divergence(*inputs, "forward_kl"), divergence(*inputs, "reverse_kl")
    assert torch.equal(divergence(*inputs, "jsd", beta=0.0), forward) and torch.equal(divergence(*inputs, "jsd", beta=1.0), reverse)
    for beta, end in ((1e-9, forward), (1 - 1e-9, reverse)):
        small = divergence(*inputs, "jsd", beta=beta)
        torch.testing.assert_close(small / min(beta, 1 - beta), end, rtol=1e-3, atol=0)
        assert not torch.allclose(small, end, rtol=0.5) and small.max() < 1e-6
    swapped = divergence(inputs[2], inputs[3], inputs[0], inputs[1], "jsd", beta=0.3)
    torch.testing.assert_close(divergence(*inputs, "jsd", beta=0.7), swapped, rtol=1e-12, atol=0)
    assert divergence(*inputs, "jsd").max() < torch.log(torch.tensor(2.0)), "bounded by log 2"


@HEAD_KINDS
@every_kind
def test_padding_of_the_vocabulary_gets_no_probability(kind, trained):
    hidden, head, teacher_hidden, teacher_head = draw(5, 23, trained)
    longer = torch.cat([teacher_head, torch.full((4, 9), 50.0)])  # heads may be padded to different lengths
    expected = definition(kind, hidden @ head[:20].T, teacher_hidden @ teacher_head[:20].T)
    values = divergence(hidden, head, teacher_hidden, longer, kind, vocab_size=20)
    values.sum().backward()
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(values, divergence(hidden, head, teacher_hidden, teacher_head, kind), rtol=1e-6)
    assert not trained or (not head.grad[20:].any() and head.grad[:20].any())


def stored(teacher_hidden, teacher_head, k, temperature=1.0, vocab=None):
    logprobs, ids = (teacher_hidden @ teacher_head[:vocab].T).div(temperature).log_softmax(-1).topk(k)
    return ids, logprobs


@HEAD_KINDS
@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_is_dense(kind, trained, temperature):
    hidden, head, *teacher = draw(7, 23, trained)
    leaves = [hidden, head] if trained else [hidden]
    dense = divergence(hidden, head, *teacher, kind, 0.3, temperature)
    top = divergence_to_top_k(hidden, head, *stored(*teacher, 23, temperature), kind, 0.3, temperature, chunk=2)
    torch.testing.assert_close(top, dense, rtol=0, atol=1e-11)
    for left, right in zip(torch.autograd.grad(top.sum(), leaves), torch.autograd.grad(dense.sum(), leaves), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


@HEAD_KINDS
@every_kind
@pytest.mark.parametrize("k", [1, 5, 22])
def test_top_k_keeps_the_missing_mass_in_one_bucket(kind, trained, k):
    hidden, head, *teacher = draw(7, 30, trained)
    ids, logprobs = stored(*teacher, k, vocab=26)
    wide_hidden, wide_head = (x.detach().clone().requires_grad_() for x in (hidden, head))
    logprobs_q = (wide_hidden @ wide_head[:26].T).log_softmax(-1)
    outcomes = []
    for known in (logprobs_q.gather(1, ids).exp(), logprobs.exp()):
        outcomes.append(torch.cat([known, 1 - known.sum(1, keepdim=True)], 1).log())
    expected = definition(kind, *outcomes)
    values = divergence_to_top_k(hidden, head, ids, logprobs, kind, vocab_size=26)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)
    gradients = torch.autograd.grad(expected.sum(), [wide_hidden, wide_head])
    values.sum().backward()
    torch.testing.assert_close(hidden.grad, gradients[0], rtol=0, atol=1e-11)
    assert head.grad is None if not trained else torch.allclose(head.grad, gradients[1], rtol=0, atol=1e-11)
    dense = divergence(hidden, head, *teacher, kind, vocab_size=26)
    assert (values < dense + 1e-12).all() and not torch.allclose(values, dense), "fewer outcomes tell less"
    assert divergence_to_top_k(hidden, head, *stored(hidden, head, k), kind).abs().max() < 1e-12


@every_kind
def test_full_vocabulary_in_float32(kind):
    inputs = draw(4, 151_936, dtype=torch.float32)
    expected, hidden_gradient, _ = truth(kind, *inputs, torch.ones(4), temperature=2.0, beta=0.2)
    values = divergence(*inputs, kind, 0.2, 2.0, chunk=3)
    values.sum().backward()
    assert values.dtype == torch.float32 and torch.isfinite(values).all()
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=0)
    assert rms(inputs[0].grad - hidden_gradient) < 1e-4 * rms(hidden_gradient)
    with torch.no_grad():
        top = divergence_to_top_k(*inputs[:2], *stored(*(x.double() for x in inputs[2:]), 64), kind, 0.2)
        assert (top > 0).all() and (top < divergence(*inputs, kind, 0.2)).all()
    ids, logprobs = stored(*(x.double() for x in inputs[2:]), 64)
    hidden, inputs[0].grad = inputs[0].detach().double().requires_grad_(), None
    known = (hidden @ inputs[1].double().T).log_softmax(-1).gather(1, ids), logprobs
    expected = definition(kind, *(torch.cat([x, (-x.logsumexp(1, keepdim=True).exp()).log1p()], 1) for x in known), beta=0.2)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    values = divergence_to_top_k(*inputs[:2], ids, logprobs, kind, 0.2, chunk=3)
    values.sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=0)
    assert rms(inputs[0].grad - gradient) < 1e-3 * rms(gradient)


@every_kind
def test_extreme_logits_stay_finite(kind):
    hidden, head, teacher_hidden, teacher_head = draw(6, 40, dtype=torch.float32)
    hidden = (hidden.detach() * 100).requires_grad_()  # both sides underflow on most tokens
    ids, logprobs = stored(teacher_hidden * 100, teacher_head, 8)
    for values in (divergence(hidden, head, teacher_hidden * 100, teacher_head, kind), divergence_to_top_k(hidden, head, ids, logprobs, kind)):
        (gradient,) = torch.autograd.grad(values.sum(), hidden)
        assert torch.isfinite(values).all() and (values > -1e-6).all() and torch.isfinite(gradient).all()


@every_kind
def test_bfloat16_is_as_exact_as_torch(kind):
    inputs = draw(64, 3000, dtype=torch.bfloat16, width=64, teacher_width=64)
    inputs[0].data.div_(4)
    expected = truth(kind, *inputs, torch.ones(64))
    values = divergence(*inputs, kind, chunk=24)
    values.sum().backward()
    peer = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    peer_values = definition(kind, F.linear(*peer), F.linear(*inputs[2:]))
    peer_values.sum().backward()
    for mine, theirs, exact in ((values, peer_values, expected[0]), (inputs[0].grad, peer[0].grad, expected[1])):
        error, bound = rms(mine.double() - exact), rms(theirs.double() - exact)
        assert 0 < bound and error <= 2 * bound and rms(exact) > 20 * error


@every_kind
def test_memory_of_the_forward_pass(kind):
    inputs = draw(256, 5000, dtype=torch.float32)
    chunk = 32 * 5000 * 4  # bytes of the logits of 32 rows
    for settings in ((divergence, inputs[2:]), (divergence_to_top_k, stored(*inputs[2:], 16))):
        with Peak() as peak:
            settings[0](*inputs[:2], *settings[1], kind, chunk=32)
        assert chunk < peak.most < 11 * chunk, f"{peak.most / chunk:.1f} x the logits of a chunk"


def test_mistakes_and_no_rows():
    inputs = draw(3, 10)
    for wrong in ({"kind": "kl"}, {"kind": "jsd", "beta": 1.5}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError):
            divergence(*inputs, **wrong)
    with pytest.raises(ValueError, match="10 and 9 tokens"):
        divergence(*inputs[:3], inputs[3][:9])
    with pytest.raises(ValueError, match="rows"):
        divergence_to_top_k(*inputs[:2], torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4))
    for trained in (False, True):
        empty = draw(0, 10, trained)
        assert divergence(*empty).shape == (0,)
    hidden, head, *teacher = (x.detach().requires_grad_() for x in draw(3, 10))
    divergence(hidden, head, *teacher).sum().backward()
    assert all(x.grad is None for x in teacher), "the teacher gets no gradient"
