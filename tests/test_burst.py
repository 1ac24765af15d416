"""Bursts: the tokens of single steps, from steps that the host does not wait for; and graphs of them, which the interpreter runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harkd.kernels.attention import attention
from harkd.sampling import burst
from tests.generator_cases import SYSTEMS, WARM, Tiny, all_pages_are_back, generator, mixed_requests, request, tokens_run
from tests.generator_cases import endless, tiny, truth  # noqa: F401
from tests.test_soak import soak, stopping  # noqa: F401
from tests.tiny import random_model


@pytest.mark.parametrize(
    "options",
    [
        {"burst": 2},
        {"burst": 5, "batch": 16, "page_size": 1},
        {"burst": 64, "batch": 9},
        {"burst": 5, "batch": 9, "step_tokens": 3},  # fewer than there are sequences
        {"burst": 7, "batch": 9, "cache_tokens": 330, "page_size": 8},
    ],
    ids=str,
)
def test_bursts_of_any_length_write_what_the_model_writes_alone(endless, truth, options):
    g = generator(endless, **options)
    for _ in range(2):
        done = {(c.request.window, c.request.sample): c for c in g.generate(mixed_requests())}
        assert {address: c.ids for address, c in done.items()} == {address: ids for address, (ids, _) in truth.items()}
        for address, (_, logprobs) in truth.items():
            torch.testing.assert_close(done[address].logprobs, logprobs, atol=1e-9, rtol=0)
    assert all_pages_are_back(g)


def test_a_soak_in_bursts(stopping, monkeypatch):
    """Free and guided texts, thoughts that are closed, preemption; single steps are the truth."""
    soak(stopping, monkeypatch, 200, burst=6)


def bursts_run(monkeypatch) -> list[int]:
    """The sequences of every burst from now on."""
    asked, write = [], burst.Burst.write
    monkeypatch.setattr(burst.Burst, "write", lambda self, some, *rest: asked.append(len(some)) or write(self, some, *rest))
    return asked


def test_the_host_is_asked_once_for_a_burst(endless, monkeypatch):
    """Nine texts of twelve tokens: after the prompts' step and its token, eleven in two bursts of eight; single steps are not taken."""
    asked = bursts_run(monkeypatch)
    sizes = tokens_run(g := generator(endless, batch=9, burst=8), monkeypatch)
    assert sum(len(c.ids) for c in g.generate([request(f"w{n}", "x", "", WARM) for n in range(9)])) == 108
    assert asked == [9, 9] and len(sizes) == 1 + 8 + 8


def test_a_burst_without_memory_comes_again_and_writes_the_same(endless, truth, monkeypatch):
    """Its third forward finds none; and later no burst of more than three."""
    hidden, calls = endless.model.hidden, []

    def short(ids, positions, plan, cache):
        calls.append(len(ids))
        if plan.max_q == 1 and (calls.count(9) == 3 or len(ids) > 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return hidden(ids, positions, plan, cache)

    monkeypatch.setattr(endless.model, "hidden", short)
    g = generator(endless, batch=9, burst=4)
    assert {(c.request.window, c.request.sample): c.ids for c in g.generate(mixed_requests())} == {a: ids for a, (ids, _) in truth.items()}
    assert g.rows <= 3 and g.step_tokens == 1024 and all_pages_are_back(g)


@pytest.fixture
def graphed(endless, monkeypatch):
    """Makes generators whose attention runs by the kernels, over graphs that replay what they captured: (them, the sizes that were made)."""
    model, made = random_model(seed=3, std=0.3, dtype=torch.float32, vocab_size=endless.tokenizer.vocab_size + 11), []

    def captured(step, *_):
        board, layers = step.args[0], step.func.__self__.cache.layers
        before = [part.clone() for layer in layers for part in layer]
        step()
        now = [part for layer in layers for part in layer]
        pairs = [[part.view(torch.int32) for part in pair] for pair in zip(now, before, strict=True)]
        assert all(torch.equal(*pair) for pair in pairs)  # an empty board stores nothing
        made.append((len(board.token), board.plan.max_k))

        def replay():
            behind = int(board.plan.cu_q[-1])
            assert not board.places[behind:].any() and (board.plan.cu_q[behind:] == behind).all()  # nothing is left of a burst before
            step()

        return replay

    def make(**options):
        g = generator(Tiny(model, None, endless.tokenizer), **options)
        g.burst.graphs = {}
        monkeypatch.setattr("harkd.qwen3.model.attention", lambda *given: attention(*given[:-1], "triton"))
        return g

    monkeypatch.setattr(burst, "captured", captured)
    monkeypatch.setattr(burst, "LEAST_KEYS", 16)
    return make, made, Tiny(model, None, endless.tokenizer)


def test_a_graph_writes_what_single_steps_write(graphed, monkeypatch):
    """Two homes and none; rows end within a burst, or have no page for its last tokens; settings that draw alike, and others."""
    make, made, tiny = graphed
    settings = [replace(WARM, max_new_tokens=new, seed=n, max_thinking=n or None) for n, new in enumerate((1, 2, 8, 4, 5, 8, 13))]
    settings[3:5] = [replace(one, presence_penalty=2.0) for one in settings[3:5]]
    requests = [request(f"w{n}", "x" * n, ("", *SYSTEMS)[(n + 1) % 3], sampling) for n, sampling in enumerate(settings)]
    expected = {c.request.window: c for c in generator(tiny, batch=16).generate(requests)}
    asked = bursts_run(monkeypatch)
    g = make(batch=16, burst=3, page_size=2)
    for c in g.generate(requests):
        other = expected.pop(c.request.window)
        assert c.ids == other.ids and len(c.ids) == c.request.sampling.max_new_tokens
        torch.testing.assert_close(c.logprobs, other.logprobs, atol=1e-4, rtol=0)
    assert not expected and all_pages_are_back(g)
    assert len(made) == len(g.burst.graphs) < len(asked) and {rows for rows, _ in made} >= {1, 2, 4} and 3 in asked
    assert all(number & (number - 1) == 0 for sizes in made for number in sizes) and len({key[-1] for key in g.burst.graphs}) == 2


def test_a_graph_without_pages_for_all_of_a_burst_gives_what_has_a_place(graphed):
    """Room for two prompts and a page more: the younger text waits until the older one has ended."""
    make, made, tiny = graphed
    requests = [request(f"w{n}", "x", "", replace(WARM, max_new_tokens=6)) for n in range(2)]
    own = len(tiny.tokenizer.encode(requests[0].prompt))
    expected = {c.request.window: c.ids for c in generator(tiny).generate(requests)}
    g = make(burst=4, page_size=2, cache_tokens=2 * own + 4)
    assert {c.request.window: c.ids for c in g.generate(requests)} == expected and made and all_pages_are_back(g)


def test_graphs_make_room_for_others_and_where_memory_is_short(graphed, monkeypatch):
    """Of three ways to draw one graph is kept at a time; a step that finds no memory drops what is kept, and comes again."""
    make, made, tiny = graphed
    monkeypatch.setattr(burst, "GRAPHS", 1)
    requests = [request(f"w{n}", "x", "", replace(WARM, temperature=1 + n / 9, max_new_tokens=5)) for n in range(3)]
    expected = {c.request.window: c.ids for c in generator(tiny).generate(requests)}
    g = make(burst=2)
    assert {c.request.window: c.ids for c in g.generate(requests)} == expected and len(g.burst.graphs) == 1 and len(made) > 3
    advance, calls = burst.Burst._advance, []

    def short(self, board, sampling):
        calls.append(len(self.graphs))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        advance(self, board, sampling)

    monkeypatch.setattr(burst.Burst, "_advance", short)
    g = make(burst=2)
    assert {c.request.window: c.ids for c in g.generate(requests)} == expected
    assert g.rows == 4 and calls[1] == 1 and calls[2] == 0  # the graphs went, the sequences stayed


def test_a_text_behind_a_prefix_that_is_not_yet_there_waits_for_it(endless):
    """A prompt of one token lacks no more than its last one, and yet the prefix."""
    asked = [replace(request(f"w{n}", "", SYSTEMS[n], WARM), prompt="x") for n in range(2)]
    expected = [c.ids for c in generator(endless, batch=1).generate(asked)]
    assert [c.ids for c in generator(endless, batch=1, burst=4).generate(asked)] == expected
    assert sorted(c.ids for c in generator(endless, burst=4).generate(asked)) == sorted(expected)


def test_a_graph_is_made_on_a_gpu_alone(tiny):
    assert generator(tiny).burst.graphs is None and generator(tiny).ahead == 1
