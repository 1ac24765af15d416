"""The generator under load: a cache far too small, stops at any place, preemption, steps without memory; and the logprobs of given text."""

from __future__ import annotations

import gc
import resource
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch

from harkd.errors import UserError
from harkd.kernels.attention import Sequences
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request
from tests.generator_cases import SYSTEMS, WARM, all_pages_are_back, alone, endless, generator, mixed_requests, request, short_of_memory, tiny, tokens_run, truth  # noqa: F401
from tests.guide_cases import LABELS, guided


def parked(g: Generator, monkeypatch) -> Counter:
    """How often each running sequence lost its pages before its end, from now on."""
    counts: Counter[str] = Counter()
    park = g.places.park
    monkeypatch.setattr(g.places, "park", lambda one: counts.update([one.request.window] if one.pages and not one.ended else []) or park(one))
    return counts


def windows(count: int, seed: int) -> list[Request]:
    """Of two homes and none, free, guided and guided with reasoning, from 1 to 90 new tokens."""
    rng = Random(seed)
    requests = []
    for n in range(count):
        sampling = replace(WARM, max_new_tokens=rng.choice([1, 5, 20, 90]), seed=seed)
        text = f"event {n} " + "fridge opened " * rng.randrange(6)
        if n % 3:
            requests.append(request(f"w{n}", text, ("", *SYSTEMS)[rng.randrange(3)], sampling, sample=n % 2))
        else:
            sampling = replace(sampling, max_new_tokens=150, max_thinking=rng.choice([5, 30]))
            requests.append(guided(f"w{n}", text, 1 + n % 2, sampling, LABELS[:4], thinking=n % 2 == 0, exact=n % 4 == 0))
    return requests


def soak(tiny, monkeypatch, count: int, size: int = 4, pages: int = 75, burst: int = 1) -> None:
    """A cache of a tenth of what the sequences that run at once may come to need; stop tokens end many texts early."""
    requests = windows(count, seed=7)
    one_by_one = generator(tiny, batch=1)
    some = Random(3).sample(requests, min(count, 120))
    expected = {c.request.window: c for c in one_by_one.generate(some)}
    g = generator(tiny, batch=24, cache_tokens=size * pages, page_size=size, step_tokens=40, burst=burst)
    need = sum(sorted(-(-g.intake.open(r).room // size) for r in requests)[-24:]) + sum(-(-len(prefix.tokens) // size) for prefix in g.prefixes.values())
    assert need >= 10 * pages  # of the 24 longest at once
    lost, seen, memory = parked(g, monkeypatch), Counter(), []
    for c in g.generate(iter(requests)):
        seen[c.request.window] += 1
        if c.request.window in expected:
            other = expected[c.request.window]
            assert (c.ids, c.finish_reason, c.request) == (other.ids, other.finish_reason, other.request)
            torch.testing.assert_close(c.logprobs, other.logprobs, atol=1e-9, rtol=0)
        if sum(seen.values()) % 200 == 0:
            gc.collect()
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert seen == Counter(r.window for r in requests)
    assert sum(lost.values()) > count / 20 and len(lost) > count / 40
    assert all_pages_are_back(g) and not g.places.active and len(g.prefixes) == 3
    if len(memory) > 10:
        assert memory[-1] - memory[len(memory) // 2] < 4 << 10  # KiB


@pytest.fixture
def stopping(tiny, truth, monkeypatch):
    """Some ordinary tokens end a text."""
    common = Counter(token for ids, _ in truth.values() for token in ids).most_common(3)
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", tuple(token for token, _ in common))
    return tiny


def test_a_soak(stopping, monkeypatch):
    soak(stopping, monkeypatch, 200)


@pytest.mark.soak
def test_a_long_soak(stopping, monkeypatch):
    soak(stopping, monkeypatch, 5000)


def test_the_youngest_makes_room_and_is_written_all_the_same(endless, monkeypatch):
    """Room for two prompts and half of what is to be written behind each."""
    requests = [request(f"w{n}", "fridge opened", "", WARM) for n in range(6)]
    own = len(endless.tokenizer.encode(requests[0].prompt))
    g = generator(endless, batch=6, page_size=1, cache_tokens=2 * own + 12)
    lost = parked(g, monkeypatch)
    done = {c.request.window: c for c in g.generate(requests)}
    assert all(done[c.request.window].ids == c.ids for c in generator(endless).generate(requests)) and len(done) == 6
    assert lost and all_pages_are_back(g) and not g.places.active
    assert list(done)[0] == "w0" and "w0" not in lost  # the oldest


@pytest.mark.parametrize("most", [1, 7, 30])
def test_a_step_without_memory_lowers_the_budget_and_goes_on(endless, truth, monkeypatch, most):
    """More than `most` tokens at once, or more than five rows of logits, find no memory: completions are the same, and the budget stays low."""
    head = endless.model.head

    def few_rows(rows, *ids):
        if len(rows) > 5:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return head(rows, *ids)

    monkeypatch.setattr(endless.model, "hidden", short_of_memory(endless.model.hidden, most))
    monkeypatch.setattr(endless.model, "head", few_rows)
    g = generator(endless, batch=9)
    assert {(c.request.window, c.request.sample): c.ids for c in g.generate(mixed_requests())} == {address: ids for address, (ids, _) in truth.items()}
    assert g.step_tokens <= most and all_pages_are_back(g)


def test_no_memory_at_all_and_other_errors_are_told(endless, monkeypatch):
    for error, raised in ((torch.OutOfMemoryError("CUDA out of memory"), UserError), (RuntimeError("CUDA error: an illegal access"), RuntimeError)):
        g = generator(endless)
        monkeypatch.setattr(endless.model, "hidden", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(raised, match="single token" if raised is UserError else "illegal access"):
            list(g.generate(mixed_requests()))
        assert all_pages_are_back(g)


@pytest.mark.parametrize("options", [{}, {"batch": 2, "step_tokens": 5}, {"batch": 9, "cache_tokens": 200, "page_size": 8}], ids=str)
def test_given_text_has_the_logprobs_with_which_it_was_written(endless, truth, monkeypatch, options):
    """Also where a sequence lost its pages half-way; and nothing given has no logprobs."""
    g = generator(endless, **options)
    given = [(r, truth[r.window, r.sample][0]) for r in mixed_requests()] + [(request("none", "fridge"), [])]
    lost = parked(g, monkeypatch)
    done = list(g.score(given))
    assert len(done) == len(given) and all_pages_are_back(g)
    for c in done:
        ids, logprobs = truth.get((c.request.window, c.request.sample), ([], []))
        assert c.ids == ids and c.finish_reason == "stop"
        torch.testing.assert_close(c.logprobs, logprobs, atol=1e-9, rtol=0)


def test_given_text_has_the_trainers_logprobs(tiny):
    """Text that nobody wrote, behind a packed prefix as in training; in float64 both agree to its rounding."""
    rng = Random(1)
    requests = [r for r in mixed_requests() if r.prefix]
    given = [(r, [rng.randrange(tiny.tokenizer.vocab_size) for _ in range(rng.randrange(1, 60))]) for r in requests]
    for c in generator(tiny, batch=3, step_tokens=50).score(given):
        prefix, prompt = tiny.tokenizer.encode(c.request.prefix), tiny.tokenizer.encode(c.request.prompt)
        p, own = len(prefix), prompt + c.ids
        hidden = tiny.model.hidden(torch.tensor(prefix + own), torch.arange(p + len(own)), Sequences.packed([p, len(own)], [-1, 0], [p], [0]))
        nll = tiny.model.nll(hidden[p + len(prompt) - 1 : -1], torch.tensor(c.ids), tiny.tokenizer.vocab_size)
        torch.testing.assert_close(-nll.double(), torch.tensor(c.logprobs, dtype=torch.float64), atol=1e-5, rtol=0)
