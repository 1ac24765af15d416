"""Draws against Hugging Face's logits processors, the noise against SplitMix64 in Python's integers."""

import itertools
import math
import random

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from harkd.errors import UserError
from harkd.sampling.request import Sampling, recommended
from harkd.sampling.sampler import noise_key, sample, uniform

BELOW_ONE = 1 - 2.0**-53
SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 500), (0.25, 0.8, 1.0), (0.0, 0.05, 0.4))
]


def expected(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that transformers would draw from, [B, V]."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


def draw(logits: torch.Tensor, sampling: Sampling, u: list[float]) -> list[int]:
    """Tokens of one row [V] at several u."""
    return sample(logits.expand(len(u), -1), sampling, torch.tensor(u, dtype=torch.float64))[0].tolist()


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}")
def test_draws_invert_the_distribution_of_hugging_face(sampling):
    """u just inside both ends of each token's interval draws that token: the sets and every renormalised probability are right to 1e-9."""
    generator = torch.Generator().manual_seed(SETTINGS.index(sampling))
    for logits in torch.randn(6, 60, generator=generator, dtype=torch.float64):
        p, order = expected(logits[None], sampling)[0].sort(descending=True)
        kept = [token for token, mass in zip(order.tolist(), p.tolist(), strict=True) if mass > 0]
        ends = p.cumsum(0).tolist()[: len(kept)]
        starts = [0.0, *ends[:-1]]
        assert all(end - start > 4e-10 for start, end in zip(starts, ends, strict=True)), "the rows are to be told apart"
        assert draw(logits, sampling, [start + 1e-10 for start in starts]) == kept
        assert draw(logits, sampling, [end - 1e-10 for end in ends]) == kept
        assert draw(logits, sampling, [0.0, BELOW_ONE]) == [kept[0], kept[-1]]


def test_the_settings_differ_in_what_they_cut():
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = {int((expected(logits, sampling) > 0).sum()) for sampling in SETTINGS}
    assert len(sizes) >= 8 and max(sizes) == 60 and min(sizes) == 1


def test_u_at_the_ends_never_draws_a_cut_token():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2000, 300, generator=generator) * 4
    for sampling in (Sampling(), Sampling(top_k=0, top_p=0.37), Sampling(top_k=3, top_p=1.0), Sampling(top_k=0, top_p=1.0, min_p=0.2), recommended(False)):
        kept = expected(logits.double(), sampling) > 0
        for u in (0.0, 5e-324, BELOW_ONE):
            tokens = sample(logits, sampling, torch.full((2000,), u, dtype=torch.float64))[0]
            assert kept.gather(-1, tokens[:, None]).all()


def test_the_end_of_an_interval_belongs_to_the_next_token():
    below, at, above = draw(torch.zeros(2), Sampling(temperature=1.0, top_p=1.0), [0.5 - 2.0**-54, 0.5, 0.75])
    assert below != at == above


def test_many_draws_have_the_distribution_of_hugging_face():
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2
    sampling, draws = Sampling(temperature=1.2, top_k=15, top_p=0.97), 60_000
    u = uniform(torch.full((draws,), noise_key(3, "window", 0)), torch.arange(draws))
    counts = torch.bincount(sample(logits.expand(draws, -1), sampling, u)[0], minlength=40)
    p = expected(logits[None].double(), sampling)[0]
    assert not counts[p == 0].any()
    kept = p > 0
    statistic = ((counts[kept] - draws * p[kept]) ** 2 / (draws * p[kept])).sum().item()
    degrees = int(kept.sum()) - 1
    assert degrees > 5 and statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_temperature_zero_takes_the_largest_logit_and_a_tiny_one_does_too():
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(4))
    u = torch.full((50,), BELOW_ONE, dtype=torch.float64)
    for temperature in (0.0, 1e-9, 1e-45, 5e-324):
        assert torch.equal(sample(logits, Sampling(temperature=temperature, top_p=1.0), u)[0], logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(temperature=2.0, top_k=0, top_p=1.0, presence_penalty=1.5)])
def test_logprobs_are_those_of_the_raw_logits(sampling):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 100, generator=generator) * 3
    written = torch.rand(64, 100, generator=generator) < 0.5
    tokens, logprobs = sample(logits, sampling, torch.rand(64, generator=generator, dtype=torch.float64), written)
    assert len(set(tokens.tolist())) > 10
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)


def test_presence_penalty_is_subtracted_once_from_written_tokens_alone():
    logits = torch.tensor([[2.0, 1.5, 0.0], [2.0, 1.5, 0.0]])
    written = torch.tensor([[True, False, False], [False, False, False]])
    u = torch.zeros(2, dtype=torch.float64)
    for penalty, first in ((0.4, 0), (0.6, 1), (-1.0, 0)):
        assert sample(logits, Sampling(temperature=0, presence_penalty=penalty), u, written)[0].tolist() == [first, 0]
    penalised = logits - torch.tensor([[0.6, 0, 0], [0, 0, 0]])
    for u in torch.linspace(0, 0.999, 60).double():
        drawn = sample(logits, Sampling(temperature=0.9, presence_penalty=0.6), u.expand(2), written)[0]
        assert torch.equal(drawn, sample(penalised, Sampling(temperature=0.9), u.expand(2))[0])


def splitmix64(key: int, position: int) -> int:
    """Output number `position` of the generator whose state is `key`, with Python's integers."""
    mask = 2**64 - 1
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_here_is_the_published_one():
    """First outputs of the reference implementation for seed 1234567."""
    assert [splitmix64(1234567, i) for i in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_is_the_upper_53_bits_of_splitmix64():
    numbers = random.Random(6)
    keys = [numbers.randrange(-(2**63), 2**63) for _ in range(300)] + [0, -1, 2**63 - 1, -(2**63)]
    positions = [numbers.choice((0, 1, 4095, 2**31, 2**40)) for _ in keys]
    drawn = uniform(torch.tensor(keys), torch.tensor(positions))
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == [(splitmix64(key, position) >> 11) / 2**53 for key, position in zip(keys, positions, strict=True)]


def test_uniform_does_not_depend_on_its_neighbours():
    keys, positions = torch.tensor([noise_key(0, f"w{i}", 0) for i in range(50)]), torch.arange(50) % 7
    together = uniform(keys, positions)
    assert [uniform(keys[i : i + 1], positions[i : i + 1]).item() for i in range(50)] == together.tolist()
    assert torch.equal(uniform(keys.flip(0), positions.flip(0)).flip(0), together)


def test_noise_over_a_grid_is_uniform_and_uncorrelated():
    """Seeds, windows, samples and positions that differ by little give noise that has nothing in common."""
    grid = torch.tensor([[noise_key(seed, f"home/{window}", index) for window in range(30)] for seed in range(6) for index in range(6)])  # [36, 30]
    noise = uniform(grid[..., None].expand(-1, -1, 64).reshape(-1), torch.arange(64).repeat(grid.numel())).view(36, 30, 64)
    flat = noise.flatten()
    assert 0 <= flat.min() and flat.max() < 1 and flat.unique().numel() == flat.numel()
    n = flat.numel()
    counts = torch.histc(flat, 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 4 * math.sqrt(2 * 63)
    centred = (noise - 0.5) * math.sqrt(12)
    for shifted in (centred.roll(1, 0), centred.roll(6, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll(7, 2)):
        assert abs((centred * shifted).mean().item()) * math.sqrt(n) < 4


def test_noise_keys_tell_addresses_apart():
    addresses = [(seed, window, index) for seed in (-1, 0, 1, 12) for window in ("a", "a1", "a12", "", "1", "a\0", "é", "\ud800") for index in (0, 1, 2, 12, 112)]
    keys = {noise_key(*address) for address in addresses}
    assert len(keys) == len(addresses)
    assert noise_key(0, "a", 12) != noise_key(0, "a1", 2)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert noise_key(0, "marble/A2m/instance1/0003", 1) == noise_key(0, "marble/A2m/instance1/0003", 1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, math.inf, math.nan)),
        ("top_k", (-1,)),
        ("top_p", (0.0, -0.5, 1.01, math.nan)),
        ("min_p", (-0.1, 1.5, math.nan)),
        ("presence_penalty", (math.inf, math.nan)),
        ("max_new_tokens", (0, -5)),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(field, values):
    for value in values:
        with pytest.raises(UserError, match=rf"{field.replace('_', '.')} must be .*not {value}"):
            Sampling(**{field: value})


def test_recommended_settings_are_those_of_the_model_cards():
    with_reasoning, without = recommended(True), recommended(False)
    assert (with_reasoning.temperature, with_reasoning.top_k, with_reasoning.top_p, with_reasoning.min_p) == (0.6, 20, 0.95, 0.0)
    assert (without.temperature, without.top_k, without.top_p, without.min_p) == (0.7, 20, 0.8, 0.0)
    assert with_reasoning.presence_penalty == without.presence_penalty == 0
    assert Sampling() == with_reasoning
