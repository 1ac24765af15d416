"""A prompt that is kept in the cache for the next request: what begins alike is not computed again, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harkd.sampling.guide import shared
from tests.generator_cases import GREEDY, SYSTEMS, Tiny, all_pages_are_back, endless, generator, request, tiny, tokens_run  # noqa: F401
from tests.guide_cases import guided


def parts(endless: Tiny):
    """A prompt that grows, its tokens, and how many of them two that follow each other share."""
    requests = [request("w", f"{'stove on, ' * n}and so on") for n in (1, 2, 4)]
    ids = [endless.tokenizer.encode(one.prompt) for one in requests]
    alike = [shared(ids[i : i + 2]) for i in range(2)]
    assert all(0 < n < len(own) - 1 for n, own in zip(alike, ids))
    return requests, list(map(len, ids)), alike


def same(done, other) -> bool:
    return done.ids == other.ids and torch.allclose(torch.tensor(done.logprobs), torch.tensor(other.logprobs), atol=1e-9)


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_next_request_goes_on_where_both_begin_alike(endless, monkeypatch, page_size):
    requests, lengths, alike = parts(endless)
    (other,) = generator(endless).generate(requests[2:])
    g = generator(endless, page_size=page_size)
    sizes, prefix = tokens_run(g, monkeypatch), len(endless.tokenizer.encode(requests[0].prefix))
    for n, one in enumerate(requests[:2]):
        g.prepare(one)
        assert sizes.pop() == lengths[n] + (prefix if n == 0 else -alike[0]) and not sizes
    (done,) = g.generate(requests[2:])
    assert same(done, other) and sizes[0] == lengths[2] - alike[1] and set(sizes[1:]) == {1}
    assert all_pages_are_back(g) and not g.places.active


def test_the_same_prompt_needs_its_last_token_alone(endless, monkeypatch):
    (one, *_), _, _ = parts(endless)
    (other,) = generator(endless).generate([one])
    g = generator(endless)
    g.prepare(one)
    sizes = tokens_run(g, monkeypatch)
    (done,) = g.generate([one])
    assert same(done, other) and set(sizes) == {1} and all_pages_are_back(g)


def test_given_text_is_scored_from_its_first_token(endless):
    (_, one, _), _, _ = parts(endless)
    given = endless.tokenizer.encode("stove, fridge, on")
    (other,) = generator(endless).score([(one, given)])
    g = generator(endless)
    for kept in (one, replace(one, prompt=one.prompt + "stove, fri")):
        g.prepare(kept)
        (done,) = g.score([(one, given)])
        assert same(done, other) and len(done.logprobs) == len(given) > 3 and all_pages_are_back(g)


def test_what_is_kept_needs_no_page_to_grow_into(endless):
    requests, lengths, _ = parts(endless)
    alone = next(
        one for one in (request("v", "bed " * n, "", replace(GREEDY, max_new_tokens=1)) for n in range(100, 150))
        if len(endless.tokenizer.encode(one.prompt)) % 16 == 15  # with the token to come it fills its last page
    )  # fmt: skip
    g = generator(endless, cache_tokens=len(endless.tokenizer.encode(alone.prompt)) + 1)
    assert len(endless.tokenizer.encode(requests[0].prefix)) + lengths[0] + 32 < 16 * len(g.cache.free)
    g.prepare(requests[0])
    (done,) = g.generate([alone])
    assert same(done, next(generator(endless).generate([alone]))) and g.cache.free.count(False) == 0


def test_guesses_find_room_behind_what_was_kept(endless, monkeypatch):
    asked = guided("w", "fridge", 6, labels=("A", "B"))
    forwards = []
    for prepared in (False, True):
        g = generator(endless)
        list(g.generate([asked]))  # the prefix is in
        if prepared:
            g.prepare(asked)
        sizes = tokens_run(g, monkeypatch)
        list(g.generate([asked]))
        forwards.append(len(sizes))
    assert forwards[0] == forwards[1] < 6


def test_others_are_not_disturbed_and_what_is_kept_makes_room(endless):
    requests, lengths, _ = parts(endless)
    (another,) = asked = [request("v", "bed " * 9, SYSTEMS[1])]
    (other,) = generator(endless).generate(asked)
    wide = generator(endless)
    wide.prepare(requests[1])
    (done,) = wide.generate(asked)
    assert same(done, other) and [one.request for one in wide.places.active] == [requests[1]]
    wide.prepare(requests[0])  # takes the place
    assert [one.request for one in wide.places.active] == [requests[0]]
    wide.prepare(another)
    assert [one.request for one in wide.places.active] == [another] and sum(prefix.users for prefix in wide.prefixes.values()) == 1

    needs = [len(endless.tokenizer.encode(text)) for text in (another.prefix, another.prompt)]
    tight = generator(endless, cache_tokens=max(sum(needs) + 12, len(endless.tokenizer.encode(requests[1].prefix)) + lengths[1]), page_size=1)
    tight.prepare(requests[1])
    (done,) = tight.generate(asked)
    assert same(done, other) and all_pages_are_back(tight) and not tight.places.active


def test_one_of_many_takes_it_over(endless):
    requests, _, _ = parts(endless)
    many = [*requests, request("x", "fridge"), request("v", "bed", SYSTEMS[1])]
    expected = {(c.request.window, c.request.prompt): c for one in many for c in generator(endless).generate([one])}
    g = generator(endless, batch=5)
    g.prepare(requests[1])
    done = list(g.generate(many))
    assert len(done) == 5 and all(same(c, expected[c.request.window, c.request.prompt]) for c in done) and all_pages_are_back(g)
