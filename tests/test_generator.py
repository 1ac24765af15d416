"""What the generator writes, against a model that runs over one whole text at a time without a cache: transformers or ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harkd.kernels.attention import Sequences
from harkd.qwen3.model import Qwen3
from harkd.sampling.generator import Generator
from tests.generator_cases import GREEDY, WARM, all_pages_are_back, alone, endless, generator, mixed_requests, request, tiny, truth  # noqa: F401


def test_the_truth_below_is_that_of_transformers(tiny, truth):
    """Our own model without a cache serves as the truth because it is float64 throughout; transformers takes norms and softmax in float32."""
    for r in mixed_requests():
        ids, logprobs = alone(tiny, r, lambda ids: tiny.theirs(ids[None]).logits[0])
        assert ids == truth[r.window, r.sample][0]
        torch.testing.assert_close(logprobs, truth[r.window, r.sample][1], atol=1e-4, rtol=0)


def test_greedy_equals_transformers_generate(endless):
    requests = [request(str(i), "fridge " * (3 * i + 1)) for i in range(5)]
    padding = list(range(endless.tokenizer.vocab_size, endless.model.config.vocab_size))
    for done in generator(endless).generate(requests):
        prompt = torch.tensor([endless.tokenizer.encode(done.request.prefix + done.request.prompt)])
        theirs = endless.theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, suppress_tokens=padding, eos_token_id=None, pad_token_id=0
        )
        assert done.ids == theirs[0, prompt.shape[1] :].tolist()
        assert (done.prompt_tokens, done.finish_reason) == (prompt.shape[1], "length")
        assert done.text == endless.tokenizer.decode(done.ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 1},
        {"batch": 16, "page_size": 1},
        {"batch": 16, "step_tokens": 16, "page_size": 5},
        {"batch": 2, "step_tokens": 3},
        {"batch": 9, "page_size": 4096, "cache_tokens": 12 * 4096},
        {"batch": 9, "cache_tokens": 330, "page_size": 8},  # room for few at once: they wait, and prefixes go and come back
        {"batch": 9, "cache_tokens": 330, "page_size": 8, "reverse": True},
        {"batch": 9, "step_tokens": 50, "joined": True},
    ],
    ids=str,
)
def test_every_way_of_batching_writes_what_the_model_writes_alone(endless, truth, options):
    options = dict(options)
    requests = mixed_requests()[:: -1 if options.pop("reverse", False) else 1]
    if options.pop("joined", False):
        requests = [replace(r, prompt=r.prefix + r.prompt, prefix="") for r in requests]
    g = generator(endless, **options)
    for _ in range(2):  # the second time with prefixes in the cache
        done = list(g.generate(requests))
        assert {(c.request.window, c.request.sample): c.ids for c in done} == {address: ids for address, (ids, _) in truth.items()}
        for c in done:
            torch.testing.assert_close(c.logprobs, truth[c.request.window, c.request.sample][1], atol=1e-9, rtol=0)
        assert len(done) == len(requests) and all_pages_are_back(g)


def test_the_settings_matter(truth):
    """The comparison above would be weak if all wrote the same."""
    assert len({tuple(ids) for ids, _ in truth.values()}) == len(truth)
    assert truth["a/2", 0] != truth["a/2", 1]
    assert len({token for ids, _ in truth.values() for token in ids}) > 30


def test_a_request_is_named_by_window_sample_and_seed(endless):
    def write(window: str, sample: int, seed: int) -> list[int]:
        return next(generator(endless).generate([request(window, "fridge", sampling=replace(WARM, seed=seed), sample=sample)])).ids

    first = write("w", 0, 0)
    assert write("w", 0, 0) == first
    assert len({tuple(ids) for ids in (first, write("w", 1, 0), write("w", 0, 1), write("v", 0, 0))}) == 4


def test_the_same_window_and_sample_twice_is_written_twice(endless):
    first, second = generator(endless).generate([request("w", "fridge", sampling=WARM)] * 2)
    assert first.ids == second.ids and first.ids is not second.ids


def test_completions_stop_at_any_of_several_ids(tiny, truth, monkeypatch):
    """Each of three ids that greedy and warm texts hold ends them; the text lacks the stop id, the logprobs have it."""
    stops = (truth["a/2", 1][0][8], truth["b/1", 0][0][1], truth["b/2", 0][0][5])
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", stops)
    seen = set()
    for c in generator(tiny).generate(mixed_requests()):
        ids, logprobs = truth[c.request.window, c.request.sample]
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        seen.add(None if end is None else ids[end])
        assert c.finish_reason == ("length" if end is None else "stop")
        assert c.ids == ids[:end] and len(c.logprobs) == len(ids if end is None else ids[: end + 1])
        assert c.text == tiny.tokenizer.decode(ids[:end])
    assert len(seen) >= 3 and None in seen


def test_a_stop_id_in_the_last_place_is_a_stop(tiny, truth, monkeypatch):
    ids = truth["a/3", 0][0]
    asked = next(r for r in mixed_requests() if r.window == "a/3")
    assert asked.sampling.max_new_tokens == len(ids) == 1
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", (ids[0],))
    (done,) = generator(tiny).generate([asked])
    assert (done.ids, done.text, done.finish_reason, len(done.logprobs)) == ([], "", "stop", 1)


def test_presence_penalty_regards_own_tokens_alone(endless):
    """A penalty beyond all logits forbids a token's second time; the neighbours' tokens and the prompt's do not count."""
    penalised = replace(GREEDY, presence_penalty=1e4, max_new_tokens=100)
    requests = [request(text, text, sampling=penalised) for text in ("fridge", "stove on", "bed")]
    together = {c.request.window: c.ids for c in generator(endless).generate(requests)}
    for asked in requests:
        (by_itself,) = generator(endless).generate([asked])
        assert together[asked.window] == by_itself.ids
        assert len(set(by_itself.ids)) == 100 and set(by_itself.ids) & set(endless.tokenizer.encode(asked.prompt))
    assert len({tuple(ids) for ids in together.values()}) == 3


def test_logprobs_are_the_trainers(tiny):
    """In float32 the sampler's logprobs and the loss of the same tokens, packed behind their prefix, differ by rounding."""
    model = Qwen3(tiny.model.config)
    model.load_state_dict(tiny.model.state_dict())
    worst = 0.0
    for c in Generator(model, tiny.tokenizer, batch=4, page_size=16).generate([replace(r, sampling=replace(WARM, max_new_tokens=40)) for r in mixed_requests() if r.prefix]):
        prefix, prompt = tiny.tokenizer.encode(c.request.prefix), tiny.tokenizer.encode(c.request.prompt)
        p, own = len(prefix), prompt + c.ids
        sequences = Sequences.packed([p, len(own)], [-1, 0], [p], [0])
        hidden = model.hidden(torch.tensor(prefix + own), torch.arange(p + len(own)), sequences)
        rows = hidden[p + len(prompt) - 1 : -1]
        nll = model.nll(rows, torch.tensor(c.ids, dtype=torch.int64), tiny.tokenizer.vocab_size)
        worst = max(worst, (nll + torch.tensor(c.logprobs[: len(c.ids)])).abs().max().item() if c.ids else 0.0)
    assert worst < 1e-4


def test_bfloat16_runs_and_its_logprobs_are_near(tiny):
    model = Qwen3(tiny.model.config)
    model.load_state_dict(tiny.model.state_dict())
    model = model.bfloat16()
    done = list(Generator(model, tiny.tokenizer, batch=4, page_size=16).generate(mixed_requests()))
    assert len(done) == len(mixed_requests())
    for c in done:
        if not c.ids:
            continue
        prompt = tiny.tokenizer.encode(c.request.prefix + c.request.prompt)
        with torch.no_grad():
            logits = tiny.theirs(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1, : tiny.tokenizer.vocab_size]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(c.ids)[:, None])[:, 0]
        assert (exact - torch.tensor(c.logprobs[: len(c.ids)])).abs().mean() < 0.3
