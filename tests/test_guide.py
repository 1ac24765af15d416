"""Guided answers: the tokens of whole answers, choices among the labels that exist, their probabilities, reasoning before them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harkd.errors import UserError
from harkd.homes.answer import canonical, parse_answer
from harkd.qwen3.template import chat, split_completion, split_prefix
from harkd.qwen3.tokenizer import Tokenizer, read_tokenizer
from harkd.sampling.generator import Generator
from harkd.sampling.guide import Walk, compile_guide
from harkd.sampling.request import Request
from tests.generator_cases import GREEDY, all_pages_are_back, generator, mixed_requests, request, tiny, tokens_run  # noqa: F401
from tests.guide_cases import LABELS, ROOM, WARM, by_hand, guided, shape
from tests.helpers import ROOT
from tests.tiny import random_model, tiny_tokenizer

QWEN3 = ROOT.parent / "shared/qwen3"


@pytest.fixture(scope="module", params=["tiny", "Qwen3"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "Qwen3" and not QWEN3.exists():
        pytest.skip("the real tokenizer is not here")
    return read_tokenizer(QWEN3 if request.param == "Qwen3" else tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def written(tokenizer, labels, chosen) -> list[int]:
    """The tokens of a guided answer in which the labels `chosen` are taken."""
    guide = compile_guide(tokenizer.encode, shape(len(chosen), labels))
    walk = Walk(guide)
    ids = [*guide.head, *walk.forced()]
    while walk.node is not None:
        option = labels.index(chosen[len(walk.probabilities) - 1])
        token = next(token for token, child in walk.node.children.items() if option in child.options)
        walk.take(token, dict.fromkeys(walk.node.children, 1.0), len(ids))
        ids += [token, *walk.forced()]
    assert len(ids) <= guide.longest
    return ids


def test_any_answer_has_the_tokens_of_the_whole(tokenizer):
    rng = Random(1)
    for events in (1, 2, 12):
        for _ in range(10):
            chosen = rng.choices(LABELS, k=events)
            assert written(tokenizer, LABELS, chosen) == tokenizer.encode(canonical(chosen))
    assert written(tokenizer, ("COOKING",), ["COOKING"] * 2) == tokenizer.encode(canonical(["COOKING"] * 2))
    assert written(tokenizer, LABELS, []) == tokenizer.encode("[]")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
def test_any_labels_at_all(tokenizer, labels, rng):
    if len({tuple(tokenizer.encode(label)) for label in labels}) == len(labels):  # else the tokenizer does not tell them apart
        chosen = rng.choices(labels, k=3)
        assert written(tokenizer, tuple(labels), chosen) == tokenizer.encode(canonical(chosen))


@pytest.mark.parametrize("exact", [False, True])
def test_probabilities_are_products_along_the_way(exact):
    """Five options by the letter, one the beginning of the next: three branches in a row, each with a quarter for going on."""
    walk = Walk(compile_guide(lambda text: list(map(ord, text)), ('["', ("A", "AB", "ABC", "X", "XY"), '"]')), exact)
    at = len('["')
    for token in "ABC":
        assert walk.forced() == [] and ord(token) in walk.node.children
        rest = 0.75 / (len(walk.node.children) - 1)
        walk.take(ord(token), {other: 0.25 if other == ord(token) else rest for other in walk.node.children}, at)
        at += 1
    assert walk.forced() == list(map(ord, '"]')) and walk.node is None
    followed = {0: 0.25 * 0.75, 1: 0.25**2 * 0.75, 2: 0.25**3}
    assert walk.probabilities == [pytest.approx(followed)]
    assert [(fork.at, fork.tokens, fork.p) for fork in walk.forks] == ([(2, [ord("X")], 0.75)] if exact else [])
    if exact:
        walk.see_fork({ord('"'): 0.1, ord("Y"): 0.9})
        assert walk.probabilities == [pytest.approx({**followed, 3: 0.075, 4: 0.675})] and not walk.forks


def test_options_of_the_same_tokens_are_no_fork():
    walk = Walk(compile_guide(lambda text: list(map(ord, text.lower())), ('["', ("A", "a", "X"), '"]')), exact=True)
    assert walk.forced() == []
    walk.take(ord("x"), {ord("a"): 0.25, ord("x"): 0.75}, 2)
    assert walk.probabilities == [{2: 0.75}] and not walk.forks  # the other two share the rest


@pytest.mark.parametrize("sampling", [ROOM, WARM, replace(WARM, seed=5)], ids=["greedy", "warm", "warm too"])
def test_every_branch_is_what_the_model_says_by_hand(tiny, sampling):
    for text, events in (("fridge opened", 3), ("stove on", 2)):
        asked = guided(text, text, events, sampling)
        ids, along, every = by_hand(tiny, asked, events)
        (done,) = generator(tiny).generate([asked])
        (exact,) = generator(tiny).generate([replace(asked, exact=True)])
        assert done.ids == exact.ids == ids and done.finish_reason == "stop" and done.text == tiny.tokenizer.decode(ids)
        assert parse_answer(done.text, events, LABELS).causes == {}
        for of_event, expected in ((done.probabilities, along), (exact.probabilities, every)):
            assert [set(event) for event in of_event] == [set(event) for event in expected]
            for event, values in zip(of_event, expected):
                assert all(event[option] == pytest.approx(p, rel=1e-9) for option, p in values.items())
        assert all(sum(event.values()) == pytest.approx(1) for event in exact.probabilities)
        assert any(len(event) < len(LABELS) for event in done.probabilities)  # some labels were not expanded
        assert sum(logprob != 0 for logprob in done.logprobs) >= events and len(done.logprobs) == len(ids)
        for event, label in zip(done.probabilities, parse_answer(done.text, events, LABELS).labels, strict=True):
            assert LABELS.index(label) in event
        taken = sum(torch.tensor(event[LABELS.index(label)]).log() for event, label in zip(exact.probabilities, parse_answer(done.text, events, LABELS).labels))
        assert sum(done.logprobs) == pytest.approx(taken.item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"batch": 1}, {"batch": 3}, {"batch": 16, "step_tokens": 16, "page_size": 1}, {"batch": 5, "step_tokens": 7}, {"batch": 9, "cache_tokens": 620, "page_size": 8}],
    ids=str,
)
def test_every_way_of_batching_gives_the_same_answers_beside_free_text(tiny, options):
    requests = [guided(f"{n}", "fridge " * n, 1 + n % 3, (ROOM, WARM)[n % 2], exact=n % 3 == 0, thinking=n % 4 == 0) for n in range(8)]
    requests = [replace(r, sampling=replace(r.sampling, max_new_tokens=180, max_thinking=9)) for r in requests]
    free = [replace(r, window=f"free {r.window}") for r in mixed_requests()]
    expected = {(c.request.window, c.request.sample): c for r in [*requests, *free] for c in generator(tiny).generate([r])}
    g = generator(tiny, **options)
    done = list(g.generate([r for pair in zip(requests, free) for r in pair] + free[8:]))
    assert len(done) == len(expected) and all_pages_are_back(g)
    for c in done:
        alone = expected[c.request.window, c.request.sample]
        assert (c.ids, c.finish_reason) == (alone.ids, alone.finish_reason)
        torch.testing.assert_close(c.logprobs, alone.logprobs, atol=1e-9, rtol=0)
        assert (c.probabilities is None) == (not c.request.answer)
        for event, other in zip(c.probabilities or [], alone.probabilities or [], strict=True):
            assert event == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(
    "said, small, forwards",  # the first takes in prefix, prompt and the first known stretch together, the others what lies between choices
    [("ABBABA", 0, 6), ("AAAAAA", 0, 6), ("AAAAAA", 128, 2), ("ABABAB", 128, 6), ("AAABBB", 128, 3), ("ABBBBB", 128, 3), ("AAAAAA", 40, 3)],
)
def test_known_stretches_take_one_forward_each_or_fewer_where_the_guess_is_right(tiny, monkeypatch, said, small, forwards):
    letter = {label: tiny.tokenizer.encode(f'"{label}"')[1] for label in "AB"}

    def run(small: int) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens of each forward, and the logits at each choice, which falls as `said`."""
        choices, head, seen, g = iter(said), tiny.model.head, [], generator(tiny)

        def says(hidden, ids):
            assert set(ids) == set(letter.values())
            seen.append(head(hidden, ids))
            return seen[-1] + 1e9 * torch.tensor([token == letter[choice] for choice in next(choices) for token in ids])

        with monkeypatch.context() as patch:
            patch.setattr("harkd.sampling.generator.SMALL", small)
            patch.setattr(tiny.model, "head", says)
            sizes = tokens_run(g, patch)
            (done,) = g.generate([guided("w", "fridge", 6, labels=("A", "B"))])
        assert "".join(parse_answer(done.text, 6, ("A", "B")).labels) == said and all_pages_are_back(g)
        return sizes, seen

    sizes, seen = run(small)
    assert len(sizes) == forwards and all(size <= max(small, 30) for size in sizes[1:])
    torch.testing.assert_close(torch.stack(seen), torch.stack(run(0)[1]), atol=1e-9, rtol=0)
    assert len(seen) == 6


@pytest.mark.parametrize("exact", [False, True])
def test_reasoning_comes_first_and_the_answer_is_always_whole(tiny, exact):
    """A random model never closes its thought itself: it is closed by --max-thinking, by the end of its turn, or by the room for the answer."""
    longest = compile_guide(tiny.tokenizer.encode, shape(2)).longest
    for new, most in ((longest + 40, None), (longest + 40, 11), (longest + 40, 0), (longest + 9, None), (400, 390)):
        sampling = replace(WARM, max_new_tokens=new, max_thinking=most)
        for n, done in enumerate(generator(tiny).generate([guided(f"{n}", "fridge", 2, sampling, thinking=True, exact=exact) for n in range(4)])):
            reasoning, answer = split_completion(done.text)
            assert done.text.startswith("<think>\n") and parse_answer(done.text, 2, LABELS).causes == {} and done.finish_reason == "stop"
            assert answer == canonical(parse_answer(done.text, 2, LABELS).labels) and done.text.endswith(f"</think>\n\n{answer}")
            assert len(done.ids) <= new and done.ids[-len(tiny.tokenizer.encode(answer)) :] == tiny.tokenizer.encode(answer)
            thought = len(done.ids) - len(tiny.tokenizer.encode(f"\n</think>\n\n{answer}"))
            assert most is None or thought <= max(most, len(tiny.tokenizer.encode("<think>\n")) + 1)


@pytest.mark.parametrize("mark", ["<|im_end|>", "</think>"])
def test_a_thought_that_ends_by_itself(tiny, monkeypatch, mark):
    """The head is made to say the mark as the fifth token."""
    head, encode = tiny.model.head, tiny.tokenizer.encode
    calls = []

    def says(hidden, ids=None):
        logits = head(hidden, ids)
        if ids is None:
            calls.append(1)
            logits[:, encode(mark)] = 1e9 if len(calls) == 5 else -1e9
        return logits

    monkeypatch.setattr(tiny.model, "head", says)
    (done,) = generator(tiny).generate([guided("w", "fridge", 2, WARM, thinking=True)])
    opening, closing = encode("<think>\n"), encode("</think>\n\n" if mark == "</think>" else "\n</think>\n\n")
    assert len(calls) == 5 and done.ids[len(opening) + 4 :][: len(closing)] == closing and done.text.count("</think>") == 1
    assert "<|im_end|>" not in done.text and parse_answer(done.text, 2, LABELS).causes == {} and len(done.logprobs) == len(done.ids)


def test_free_text_is_made_to_close_its_thought_if_it_has_begun_one(tiny, monkeypatch):
    head, encode = tiny.model.head, tiny.tokenizer.encode
    asked = request("w", "fridge", sampling=replace(GREEDY, max_new_tokens=30, max_thinking=8))
    (without,) = generator(tiny).generate([asked])
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", ())
    calls = []

    def thinks(hidden):
        logits = head(hidden)
        calls.append(1)
        logits[:, encode("<think>")] = 1e9 if len(calls) == 1 else -1e9
        return logits

    monkeypatch.setattr(tiny.model, "head", thinks)
    (done,) = generator(tiny).generate([asked])
    closing = encode("\n</think>\n\n")
    assert done.ids[8 : 8 + len(closing)] == closing and len(done.ids) == 30 and done.text.startswith("<think>") and done.text.count("</think>") == 1
    assert "</think>" not in without.text
    calls.clear()  # no room to answer: the text is cut off as it would be
    (done,) = generator(tiny).generate([replace(asked, sampling=replace(asked.sampling, max_new_tokens=9))])
    assert "</think>" not in done.text and done.finish_reason == "length"


def test_a_window_without_events_and_a_label_that_nfc_changes(tiny):
    for labels in (LABELS, ("COOKING",)):
        events = 0 if labels is LABELS else 3
        asked = [guided("w", "x", events, labels=labels), guided("v", "x", events, replace(ROOM, max_thinking=5), labels=labels, thinking=True)]
        done = {c.request.window: c for c in generator(tiny).generate(asked)}
        assert done["w"].text == canonical(labels[:1] * events) and split_completion(done["v"].text)[1] == done["w"].text
        assert done["w"].probabilities == done["v"].probabilities == [{0: 1.0}] * events and done["v"].finish_reason == "stop"
    alike = ("cafe\u0301", "caf\u00e9")  # the same tokens
    (done,) = generator(tiny).generate([guided("w", "x", 2, labels=alike)])
    assert done.text == canonical(alike[1:] * 2)
    labels = ("cafe\u0301", "caf")
    (done,) = generator(tiny).generate([guided("w", "x", 4, WARM, labels=labels)])
    assert parse_answer(done.text, 4, labels).causes == {} and set(done.probabilities[0]) == {0, 1}


def test_an_answer_that_cannot_end_is_refused(tiny):
    longest = compile_guide(tiny.tokenizer.encode, shape(2)).longest
    for asked in (guided("w", "x", 2, replace(ROOM, max_new_tokens=longest - 1)), guided("w", "x", 2, replace(ROOM, max_new_tokens=longest + 4), thinking=True)):
        with pytest.raises(UserError, match="guided answer to 'w' takes up to .* --max-new-tokens"):
            list(generator(tiny).generate([asked]))


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> tuple[Generator, list[Request], list[list[str]]]:
    """A tiny model that has learnt by heart the answers to twelve prompts, fed token by token; labels begin alike."""
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("taught")))
    labels, rng = LABELS[:5], Random(2)
    model = random_model(seed=1, std=0.08, hidden_size=64, intermediate_size=128, vocab_size=tokenizer.vocab_size, tie_word_embeddings=True)
    texts = [f"window {chr(97 + n)}" for n in range(12)]
    answers = [rng.choices(labels, k=3) for _ in texts]
    turns = [[{"role": "user", "content": text}] for text in texts]
    prompts = [chat(turn, thinking=False, generation_prompt=True) for turn in turns]
    asked = [Request(text, *reversed(split_prefix(prompt)), sampling=replace(ROOM, max_new_tokens=250)) for text, prompt in zip(texts, prompts)]
    asked = [replace(one, answer=shape(3, labels)) for one in asked]
    examples = [(tokenizer.encode(p), tokenizer.encode(canonical(a) + "<|im_end|>")) for p, a in zip(prompts, answers)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    from harkd.kernels.attention import Sequences

    lengths = [len(p) + len(a) for p, a in examples]
    ids = torch.tensor([token for p, a in examples for token in p + a])
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = torch.cat([torch.arange(start + len(p) - 1, start + len(p) + len(a) - 1) for start, (p, a) in zip(starts, examples)])
    for _ in range(150):
        loss = model.nll(model.hidden(ids, positions, Sequences.packed(lengths))[rows], ids[rows + 1]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Generator(model.eval(), tokenizer, batch=4), asked, answers


def test_guided_greedy_is_free_greedy_where_free_text_is_well_formed(taught):
    g, asked, answers = taught
    guided_text = {done.request.window: done for done in g.generate(asked)}
    compared = learnt = 0
    for done in g.generate([replace(one, answer=()) for one in asked]):
        labels = parse_answer(done.text, 3, LABELS[:5]).labels
        if None not in labels and done.text == canonical(labels) and done.ids == g.tokenizer.encode(done.text):
            compared += 1
            learnt += list(labels) == answers[[one.window for one in asked].index(done.request.window)]
            assert guided_text[done.request.window].ids == done.ids and guided_text[done.request.window].text == done.text
    assert compared >= 9 and learnt >= 6
