"""The model with every kernel switched on, in Triton's interpreter: the reference's logits, gradients of an adapter, and completions."""

from dataclasses import replace

import pytest
import torch

from harkd.distill.packing import collate
from harkd.kernels import cached_attention, packed_attention, rms_norm_triton, rope_triton, swiglu_triton
from harkd.qwen3.lora import LoraConfig, add_lora
from harkd.qwen3.tokenizer import read_tokenizer
from harkd.sampling.generator import Generator
from tests.distill_cases import make_examples
from tests.generator_cases import GREEDY, SYSTEMS, request
from tests.tiny import random_model, tiny_tokenizer


def adapted(dtype: torch.dtype = torch.float32):
    """A model with a drawn adapter, and the adapter's parameters."""
    model = random_model(seed=5, vocab_size=48, num_hidden_layers=1).to(dtype)
    parameters = add_lora(model, LoraConfig(r=3, alpha=6), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, parameters


def losses_and_gradients(model, parameters) -> list[torch.Tensor]:
    """Of one pack: two homes whose examples share their prefixes."""
    batch = collate(make_examples(3, longest=20))
    losses = model.nll(model.hidden(batch.ids, batch.positions, batch.sequences)[batch.rows], batch.targets)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), list(parameters.values()))]


def distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def test_losses_and_gradients_of_a_pack():
    truth = losses_and_gradients(*adapted(torch.float64))
    model, parameters = adapted()
    found = {}
    for model.backend in ("torch", "auto", "triton"):
        found[model.backend] = losses_and_gradients(model, parameters)
    for backend in ("auto", "triton"):
        for mine, theirs, exact in zip(found[backend], found["torch"], truth, strict=True):
            assert distance(mine, exact) <= 2 * distance(theirs, exact) + 1e-6, backend
            assert distance(torch.zeros_like(mine), exact) > 0.5 and distance(mine * 1.01, exact) > 5e-3


def test_logits():
    ids = torch.arange(40) % 48
    exact, (model, _) = adapted(torch.float64)[0].logits(ids), adapted()
    plain = model.logits(ids)
    model.backend = "triton"
    with torch.no_grad():
        assert distance(model.logits(ids), exact) <= 2 * distance(plain, exact) + 1e-6 < 1e-4


@pytest.mark.parametrize(
    ("module", "kernel"),
    [(packed_attention, "_forward"), (rms_norm_triton, "_forward"), (rope_triton, "_forward"), (swiglu_triton, "_forward")],
    ids=lambda part: getattr(part, "__name__", part).rpartition(".")[2],
)
def test_each_kernel_takes_part(module, kernel, monkeypatch):
    class Absent:
        def __getitem__(self, grid):
            raise RuntimeError("this kernel was asked for")

    model, _ = adapted()
    monkeypatch.setattr(module, kernel, Absent())
    model.logits(torch.arange(9))  # the reference does not ask
    model.backend = "triton"
    with pytest.raises(RuntimeError, match="this kernel was asked for"):
        model.logits(torch.arange(9))


def test_completions_over_the_cache(tmp_path, monkeypatch):
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    model = random_model(seed=3, std=0.3, vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    requests = [request("a", "fridge opened"), request("b", "stove on, chair occupied", sampling=replace(GREEDY, max_new_tokens=5)), request("c", "bed", SYSTEMS[1]), request("d", "x", "")]
    calls = []
    cached = cached_attention.cached_attention
    monkeypatch.setattr(cached_attention, "cached_attention", lambda *a: calls.append(1) or cached(*a))

    def written() -> dict[str, tuple[list[int], list[float]]]:
        generator = Generator(model, tokenizer, batch=3, cache_tokens=1024, page_size=16, step_tokens=64)
        return {done.request.window: (done.ids, done.logprobs) for done in generator.generate(requests)}

    plain = written()
    assert not calls and GREEDY.temperature == 0
    model.backend = "triton"
    kernels = written()
    assert calls and {window: ids for window, (ids, _) in kernels.items()} == {window: ids for window, (ids, _) in plain.items()}
    for window, (_, logprobs) in kernels.items():
        assert torch.allclose(torch.tensor(logprobs), torch.tensor(plain[window][1]), atol=1e-3)
