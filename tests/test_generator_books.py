"""The generator's books: pages, prefixes, places, budgets, and what happens when something goes wrong."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from itertools import count, islice

import pytest
import torch

from harkd.errors import UserError
from harkd.memory import free_memory
from harkd.qwen3.cache import Cache
from harkd.sampling.generator import Completion, Request
from tests.generator_cases import GREEDY, SYSTEMS, WARM, all_pages_are_back, endless, generator, mixed_requests, request, tiny, tokens_run, truth  # noqa: F401


def test_a_prefix_is_computed_once(endless, monkeypatch):
    g = generator(endless)
    sizes = tokens_run(g, monkeypatch)
    requests = [request(str(i), f"event {i}") for i in range(6)]
    prefix = len(endless.tokenizer.encode(requests[0].prefix))
    own = sum(len(endless.tokenizer.encode(r.prompt)) + r.sampling.max_new_tokens - 1 for r in requests)  # the last token never enters the cache
    list(g.generate(requests))
    assert prefix > 20 and sum(sizes) == prefix + own
    list(g.generate(requests))
    assert sum(sizes) == prefix + 2 * own


def test_an_unused_prefix_makes_room_and_is_computed_again(endless, truth, monkeypatch):
    """Pages for the prefix of one home and one request at a time."""
    requests = [r for r in mixed_requests() if r.prefix and r.window in ("a/1", "b/1", "a/3")]
    lengths = {r.prefix: len(endless.tokenizer.encode(r.prefix)) for r in requests}
    own = sum(len(endless.tokenizer.encode(r.prompt)) + r.sampling.max_new_tokens - 1 for r in requests)
    g = generator(endless, cache_tokens=max(lengths.values()) + 45, page_size=1)
    sizes = tokens_run(g, monkeypatch)
    done = list(g.generate(requests))
    assert [c.request.window for c in done] == ["a/1", "b/1", "a/3"]
    assert all(c.ids == truth[c.request.window, 0][0] for c in done)
    a, b = lengths[requests[0].prefix], lengths[requests[1].prefix]
    assert sum(sizes) == own + 2 * a + b
    assert all_pages_are_back(g)


def test_a_request_without_a_prefix_waits_where_no_page_is_free(endless):
    with_prefix, without = request("a", "x"), request("b", "y" * 30, "")
    room = [len(endless.tokenizer.encode(text)) for text in (with_prefix.prefix, with_prefix.prompt)]
    g = generator(endless, cache_tokens=sum(room) + 12, page_size=1)
    assert [c.request.window for c in g.generate([with_prefix, without, with_prefix])] == ["a", "b", "a"]
    assert all_pages_are_back(g)


def test_free_places_are_filled_at_once(endless, monkeypatch):
    g = generator(endless, batch=2)
    lengths = [3, 9, 3, 3, 1, 2]
    requests = [request(str(i), "x", sampling=replace(WARM, max_new_tokens=n)) for i, n in enumerate(lengths)]
    sizes = tokens_run(g, monkeypatch)
    order = [c.request.window for c in g.generate(requests)]
    assert sorted(order) == list("012345") and order[0] == "0"
    assert len(sizes) - 1 <= sum(lengths) // 2 + 2  # forwards besides the prefix's: both places are busy nearly throughout


def test_requests_are_taken_as_places_become_free(endless):
    taken = []
    requests = (taken.append(i) or request(str(i), "x", sampling=replace(WARM, max_new_tokens=1 + i % 5)) for i in range(200))
    g = generator(endless, batch=3)
    completions = g.generate(requests)
    for finished in range(1, 40):
        next(completions)
        assert len(taken) <= finished + 3 + 1  # those that run, and the next one
    completions.close()
    assert all_pages_are_back(g)


def test_many_more_requests_than_places_each_once(tiny):
    requests = [request(f"w{i}", "x" * (i % 7), SYSTEMS[i % 2], replace(WARM, max_new_tokens=1 + i % 6), sample=i % 3) for i in range(120)]
    g = generator(tiny, batch=7, cache_tokens=400)
    done = Counter(c.request.window for c in g.generate(requests))
    assert done == Counter(r.window for r in requests)
    assert all_pages_are_back(g)


def test_prompts_share_a_step_with_those_that_write(endless, monkeypatch):
    """No forward exceeds the budget; a short request behind a long prompt is not held up, and a long one is not starved by newer short ones."""
    g = generator(endless, batch=3, step_tokens=20)
    sizes = tokens_run(g, monkeypatch)
    short = [request(f"short {i}", "x" * 10, "", replace(WARM, max_new_tokens=2)) for i in range(30)]
    order = [c.request.window for c in g.generate([short[0], request("long", "chair occupied " * 30, "", replace(WARM, max_new_tokens=2)), *short[1:]])]
    assert max(sizes) == 20
    assert order[0] == "short 0"
    assert order.index("long") < 10


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_pages_come_back_when_the_caller_stops_early(endless, taken):
    g = generator(endless)
    completions = g.generate(mixed_requests())
    assert len(list(islice(completions, taken))) == taken
    completions.close()
    assert all_pages_are_back(g)


def test_pages_come_back_when_the_requests_fail(endless):
    def requests():
        yield from mixed_requests()[:5]
        raise OSError("the disk is gone")

    g, done = generator(endless, batch=2), []
    with pytest.raises(OSError, match="disk"):
        for completion in g.generate(requests()):
            done.append(completion)
    assert done and all_pages_are_back(g)


def test_a_failing_forward_costs_no_page_and_spoils_no_prefix(endless, truth, monkeypatch):
    """The model fails in its n-th forward, be it the prefix's second stretch or a step; afterwards the generator works as if nothing had happened."""
    hidden, g = endless.model.hidden, generator(endless, step_tokens=16, batch=2)
    for n in (0, 1, 3, 4, 9):
        with monkeypatch.context() as patch:
            calls = count()
            patch.setattr(g.model, "hidden", lambda *args, n=n, calls=calls: 1 / 0 if next(calls) == n else hidden(*args))
            with pytest.raises(ZeroDivisionError):
                list(g.generate(mixed_requests()[:4]))
        assert all_pages_are_back(g)
        assert all(c.ids == truth[c.request.window, c.request.sample][0] for c in g.generate(mixed_requests()[:4]))
        for prefix in g.prefixes.values():  # as if new
            g.cache.release(prefix.pages)
            prefix.pages, prefix.past = [], 0


def test_two_iterators_of_one_generator_may_alternate(endless, truth):
    g = generator(endless, batch=2)
    iterators = [g.generate(mixed_requests()), g.generate(mixed_requests()[::-1])]
    done: list[Completion] = [c for pair in zip(*iterators, strict=True) for c in pair]
    assert all(c.ids == truth[c.request.window, c.request.sample][0] for c in done)
    assert all(next(iterator, None) is None for iterator in iterators) and all_pages_are_back(g)


def test_requests_that_cannot_fit_are_refused_by_name(endless):
    long = replace(GREEDY, max_new_tokens=500)
    g, done = generator(endless), []
    with pytest.raises(UserError, match=r"'w 7'.*512 positions"):
        for c in g.generate([request("w 1", "x"), request("w 3", "x"), request("w 7", "x", sampling=long), request("w 2", "x")]):
            done.append(c.request.window)
    assert done == ["w 1", "w 3"] and all_pages_are_back(g)  # what ran was not lost
    g, done = generator(endless, cache_tokens=200), []
    with pytest.raises(UserError, match=r"'w 8'.*more than the cache holds"):
        for c in g.generate([request("w 1", "x"), request("w 8", "x", sampling=replace(GREEDY, max_new_tokens=200)), request("w 2", "x")]):
            done.append(c.request.window)
    assert done == ["w 1"] and all_pages_are_back(g)
    with pytest.raises(UserError, match="'w 9'.*cache"):  # not even the prefix
        list(generator(endless, cache_tokens=16).generate([request("w 9", "x")]))


def test_what_just_fits_is_written(endless):
    asked = request("w", "x")
    need = len(endless.tokenizer.encode(asked.prefix)) + len(endless.tokenizer.encode(asked.prompt)) + 12
    assert [len(c.ids) for c in generator(endless, cache_tokens=need, page_size=1).generate([asked])] == [12]
    with pytest.raises(UserError, match=f"needs {need} tokens"):
        list(generator(endless, cache_tokens=need - 1, page_size=1).generate([asked]))


def test_mistakes_are_told(tiny):
    with pytest.raises(UserError, match="'w'.*empty prompt"):
        list(generator(tiny).generate([Request("w", "", "<|im_start|>")]))
    for option in ("batch", "cache_tokens", "page_size", "step_tokens"):
        with pytest.raises(UserError, match="at least 1"):
            generator(tiny, **{option: 0})


def test_no_requests_give_no_completions(tiny):
    assert list(generator(tiny).generate([])) == []


def test_the_model_runs_in_inference_mode_and_the_caller_does_not(endless, monkeypatch):
    """Neither the iterable of requests nor the loop body: their tensors stay ordinary."""
    modes, hidden = [], endless.model.hidden
    monkeypatch.setattr(endless.model, "hidden", lambda *args: modes.append(torch.is_inference_mode_enabled()) or hidden(*args))

    def requests():
        assert not torch.is_inference_mode_enabled()
        yield from mixed_requests()[:3]

    for _ in generator(endless).generate(requests()):
        weight = torch.ones(2, requires_grad=True)
        (weight * torch.ones(2)).sum().backward()
        assert weight.grad is not None
    assert len(modes) > 10 and all(modes)


def test_the_cache_has_half_of_the_free_memory(tiny, monkeypatch):
    """In float64, 2 layers of 2 heads of 16: 1 KiB a token. Given a number, that number; never more than its places can use."""
    positions = tiny.model.config.max_position_embeddings
    for free, tokens in ((200 << 10, 100), (1 << 40, 5 * positions), (0, 4)):
        monkeypatch.setattr("harkd.qwen3.cache.free_memory", lambda device, free=free: free)
        assert len(generator(tiny, cache_tokens=None, page_size=4).cache.free) * 4 == tokens
        assert len(generator(tiny, cache_tokens=40, page_size=4).cache.free) == 10


def test_a_cache_that_finds_no_memory_is_made_smaller(endless, truth, monkeypatch):
    made = Cache.__init__

    def small(self, config, pages, *rest):
        if pages > 40:
            raise UserError("there is no memory for a cache of so many tokens")
        made(self, config, pages, *rest)

    monkeypatch.setattr(Cache, "__init__", small)
    g = generator(endless, cache_tokens=None)
    assert 20 <= len(g.cache.free) <= 40
    assert all(c.ids == truth[c.request.window, c.request.sample][0] for c in g.generate(mixed_requests()))
    with pytest.raises(UserError, match="no memory for a cache"):
        generator(endless, cache_tokens=41 * 16)


def test_free_memory_is_that_of_the_machine():
    assert 50 << 20 < free_memory("cpu") < 1 << 44


def test_free_memory_counts_what_can_be_had_again(tmp_path, monkeypatch):
    """A container's file cache, and on a GPU what torch holds and does not use; a system may tell the size of its memory alone."""
    for name, text in {"proc/meminfo": "MemFree: 9 kB\nMemAvailable: 4000 kB\n", "sys/fs/cgroup/memory.max": "3000000\n", "sys/fs/cgroup/memory.current": "2900000\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("harkd.memory.Path", lambda path: tmp_path / path[1:])
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("file 2600000\nactive_file 600000\ninactive_file 2000000\n")
    assert free_memory("cpu") == 3_000_000 - 2_900_000 + 2_000_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert free_memory("cpu") == 4000 << 10
    (tmp_path / "proc/meminfo").unlink()
    monkeypatch.delitem(os.sysconf_names, "SC_AVPHYS_PAGES")
    assert free_memory("cpu") == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, value in {"mem_get_info": (1000, 9000), "memory_reserved": 500, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory("cuda:1") == 1300
