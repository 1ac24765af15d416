"""Requests of two homes, a tiny model in ours and transformers' form, and what it writes for each request alone, without a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import Qwen3Config as TheirConfig
from transformers import Qwen3ForCausalLM

from harkd.qwen3.model import Qwen3
from harkd.qwen3.template import chat, split_prefix
from harkd.qwen3.tokenizer import Tokenizer, read_tokenizer
from harkd.sampling.generator import Generator, Request
from harkd.sampling.request import Sampling
from harkd.sampling.sampler import noise_key, sample, uniform
from tests.tiny import random_model, tiny_tokenizer

SYSTEMS = ("You name activities at home. kitchen: fridge, stove. " * 2, "Another home: bath, bed.")
GREEDY = Sampling(temperature=0, max_new_tokens=12)
WARM = Sampling(temperature=1.3, top_k=40, top_p=0.95, max_new_tokens=12)
Written = dict[tuple[str, int], tuple[list[int], list[float]]]  # (window, sample): ids, logprobs


@dataclass
class Tiny:
    model: Qwen3
    theirs: Qwen3ForCausalLM
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    """Two layers in float64; the head's rows behind the vocabulary would often win if they were let."""
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    model = random_model(seed=3, std=0.3, dtype=torch.float64, vocab_size=tokenizer.vocab_size + 11, max_position_embeddings=512)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] = 3 * model.lm_head.weight[:11]
    theirs = Qwen3ForCausalLM(TheirConfig(**model.config.to_dict(), attn_implementation="eager")).double().eval()
    theirs.load_state_dict(model.state_dict())
    return Tiny(model, theirs, tokenizer)


def request(window: str, text: str, system: str = SYSTEMS[0], sampling: Sampling = GREEDY, sample: int = 0) -> Request:
    turns = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
    prefix, rest = split_prefix(chat(turns, generation_prompt=True))
    return Request(window, rest, prefix, sample, sampling)


def mixed_requests() -> list[Request]:
    """Two homes and none, short and long prompts, several settings, two samples of one window."""
    penalised = replace(WARM, presence_penalty=2.0, max_new_tokens=9)
    return [
        request("a/1", "fridge opened"),
        request("a/2", "stove on, chair occupied " * 5, sampling=WARM),
        request("a/2", "stove on, chair occupied " * 5, sampling=WARM, sample=1),
        request("b/1", "bed occupied", SYSTEMS[1], WARM),
        request("", "no home at all", "", WARM),
        request("b/2", "bath " * 12, SYSTEMS[1], replace(GREEDY, presence_penalty=50.0)),
        request("a/3", "x", sampling=replace(WARM, max_new_tokens=1)),
        request("b/3", "bed free", SYSTEMS[1], penalised),
        request("c/1", "no home either " * 3, "", replace(GREEDY, max_new_tokens=5)),
    ]


def alone(tiny: Tiny, request: Request, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[int], list[float]]:
    """Ids and logprobs that a model without cache and the sampler write, every step over the whole text, up to the length that was asked for."""
    prompt = tiny.tokenizer.encode(request.prefix + request.prompt)
    written: list[int] = []
    logprobs: list[float] = []
    sampling, key = request.sampling, noise_key(request.sampling.seed, request.window, request.sample)
    while len(written) < sampling.max_new_tokens:
        with torch.no_grad():
            logits = logits_of(torch.tensor(prompt + written))[-1:, : tiny.tokenizer.vocab_size]
        mask = torch.zeros_like(logits, dtype=torch.bool)
        mask[0, torch.tensor(written, dtype=torch.int64)] = True
        token, logprob = sample(logits, sampling, uniform(torch.tensor([key]), torch.tensor([len(written)])), mask)
        written.append(token.item())
        logprobs.append(logprob.item())
    return written, logprobs


@pytest.fixture(scope="module")
def truth(tiny) -> Written:
    return {(r.window, r.sample): alone(tiny, r, tiny.model.logits) for r in mixed_requests()}


@pytest.fixture
def endless(tiny, monkeypatch) -> Tiny:
    """Without stop ids every completion has the length that was asked for."""
    monkeypatch.setattr(tiny.tokenizer, "stop_ids", ())
    return tiny


def generator(tiny: Tiny, **options) -> Generator:
    return Generator(tiny.model, tiny.tokenizer, **{"batch": 4, "cache_tokens": 4096, "page_size": 16, **options})


def all_pages_are_back(g: Generator) -> bool:
    """Every page is free or belongs to a prefix that nobody uses, and no two prefixes share one."""
    held = [page for prefix in g.prefixes.values() for page in prefix.pages]
    return len(held) == len(set(held)) == g.cache.free.count(False) and not any(prefix.users for prefix in g.prefixes.values())


def tokens_run(g: Generator, monkeypatch) -> list[int]:
    """The packed tokens of every forward from now on."""
    sizes: list[int] = []
    hidden = g.model.hidden
    monkeypatch.setattr(g.model, "hidden", lambda ids, *rest: sizes.append(len(ids)) or hidden(ids, *rest))
    return sizes


def short_of_memory(hidden: Callable, most: int) -> Callable:
    """A model's `hidden` that finds no memory for more than `most` tokens at once."""

    def run(ids, *rest):
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return hidden(ids, *rest)

    return run
