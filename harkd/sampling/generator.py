"""Many completions at once over one cache: continuous batching with chunked prefill and shared prefixes.

Each step is one packed forward of, for every running sequence, the tokens that its cache lacks: one for a sequence that is writing, a stretch of the prompt for a new one, under a
budget of tokens. Where a sequence's prompt is complete, its last row gives the next token. A sequence that ends gives its pages to the next request at once. A prefix that requests share
is computed once and its pages are read by all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from harkd.errors import UserError
from harkd.kernels.attention import Sequences
from harkd.qwen3.cache import Cache
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import Tokenizer
from harkd.sampling.sampler import Sampling, noise_key, sample, uniform


@dataclass(frozen=True)
class Request:
    """One completion to write: `prompt` is rendered text (see Tokenizer.chat), of which requests may share the beginning `prefix`, which must end at a special token."""

    window: str  # names the request; with `sample` and the seed it decides the noise
    prompt: str  # what follows the prefix
    prefix: str = ""
    sample: int = 0
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Completion:
    """What was written: ids without the stop token, logprobs of all sampled tokens (the stop token's too), "stop" or "length"."""

    request: Request
    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int


@dataclass(eq=False)
class _Prefix:
    ids: list[int]
    pages: list[int]
    users: int = 0


@dataclass(eq=False)
class _Running:
    request: Request
    key: int
    pending: list[int]  # tokens that the cache lacks
    prompt_tokens: int
    pages: list[int]
    prefix: _Prefix | None
    past: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Generator:
    """Writes completions with one model and one tokenizer.

    Args: batch: sequences that run at once; cache_tokens: room of the cache, shared by prefixes and sequences; page_size: tokens in a page;
    step_tokens: most tokens of one forward.
    """

    def __init__(
        self, model: Qwen3, tokenizer: Tokenizer, batch: int = 16, cache_tokens: int = 65536, page_size: int = 32, step_tokens: int = 1024
    ) -> None:
        self.model, self.tokenizer, self.batch, self.step_tokens = model, tokenizer, batch, max(step_tokens, batch)
        self.cache = Cache(model.config, -(-cache_tokens // page_size), page_size, model.dtype, model.device)
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)  # ids above are padding of the head
        self.prefixes: dict[str, _Prefix] = {}

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield a completion for every request as it ends, in no fixed order. Raises UserError for a request that cannot fit."""
        waiting = ((request, self.tokenizer.encode(request.prompt)) for request in requests)
        first, running = next(waiting, None), []
        try:
            while True:
                while first and len(running) < self.batch and (sequence := self._admit(*first, bool(running))):
                    running.append(sequence)
                    first = next(waiting, None)
                if not running:
                    return
                self._step(running)
                ended = [sequence for sequence in running if self._has_ended(sequence)]
                running = [sequence for sequence in running if sequence not in ended]
                for sequence in ended:
                    self._release(sequence)
                yield from map(self._completion, ended)
        finally:  # the caller may stop early
            for sequence in running:
                self._release(sequence)

    def _admit(self, request: Request, own: list[int], others_run: bool) -> _Running | None:
        """Give a request its pages, and compute its prefix where it is new. None: wait until another sequence ends."""
        if not own:
            raise UserError(f"the request {request.window!r} has an empty prompt")
        prefix_ids = self.prefixes[request.prefix].ids if request.prefix in self.prefixes else self.tokenizer.encode(request.prefix)
        need = len(own) + request.sampling.max_new_tokens
        if len(prefix_ids) + need > self.model.config.max_position_embeddings:
            raise UserError(
                f"the request {request.window!r} needs {len(prefix_ids) + need} tokens (prompt and new ones), and the model has {self.model.config.max_position_embeddings} positions"
            )
        prefix = self._prefix(request.prefix, prefix_ids)
        if prefix is not None:
            prefix.users += 1  # before the next allocation, which may drop unused prefixes
            if (pages := self._allocate(need)) is not None:
                key = noise_key(request.sampling.seed, request.window, request.sample)
                return _Running(request, key, own, len(prefix_ids) + len(own), pages, prefix)
            prefix.users -= 1
        if not others_run:
            raise UserError(f"the request {request.window!r} needs {len(prefix_ids) + need} tokens, more than the cache holds")
        return None

    def _prefix(self, text: str, ids: list[int]) -> _Prefix | None:
        """The shared prefix in the cache, computed now where it is not there; None where its pages are not to be had."""
        if text not in self.prefixes:
            pages = self._allocate(len(ids))
            if pages is None:
                return None
            prefix = _Prefix(ids, pages)
            for begin in range(0, len(ids), self.step_tokens):
                self._forward([(ids[begin : begin + self.step_tokens], begin, pages, None)])
            self.prefixes[text] = prefix
        return self.prefixes[text]

    def _allocate(self, tokens: int) -> list[int] | None:
        """Pages for tokens; prefixes that nobody uses make room, the oldest first."""
        while (pages := self.cache.allocate(tokens)) is None:
            unused = next((text for text, prefix in self.prefixes.items() if not prefix.users), None)
            if unused is None:
                return None
            self.cache.release(self.prefixes.pop(unused).pages)
        return pages

    def _release(self, sequence: _Running) -> None:
        self.cache.release(sequence.pages)
        sequence.prefix.users -= 1

    def _step(self, running: list[_Running]) -> None:
        """One forward: every sequence that writes gets its token in, prompts share what is left of the budget; complete ones get their next token."""
        work, budget = [], self.step_tokens
        for sequence in sorted(running, key=lambda s: len(s.pending)):  # those that write first
            tokens = sequence.pending[:budget]
            if tokens:
                work.append((sequence, tokens))
                budget -= len(tokens)
        hidden = self._forward([(tokens, s.past, s.pages, s.prefix) for s, tokens in work])
        last = list(accumulate(len(tokens) for _, tokens in work))
        ready = [(s, row - 1) for (s, tokens), row in zip(work, last, strict=True) if len(tokens) == len(s.pending)]
        for sequence, tokens in work:
            sequence.past += len(tokens)
            sequence.pending = sequence.pending[len(tokens) :]
        for sampling in {s.request.sampling for s, _ in ready}:
            self._write([(s, row) for s, row in ready if s.request.sampling == sampling], sampling, hidden)

    def _write(self, ready: list[tuple[_Running, int]], sampling: Sampling, hidden: Tensor) -> None:
        """Draw the next token of sequences whose last hidden row is given."""
        device = hidden.device
        logits = self.model.head(hidden[[row for _, row in ready]])[:, : self.vocab_size]  # [B, V]
        keys = torch.tensor([s.key for s, _ in ready], device=device)
        positions = torch.tensor([len(s.ids) for s, _ in ready], device=device)
        written = None
        if sampling.presence_penalty:
            written = torch.zeros_like(logits, dtype=torch.bool)
            for row, (s, _) in enumerate(ready):
                written[row, s.ids] = True
        tokens, logprobs = sample(logits, sampling, uniform(keys, positions), written)
        for (s, _), token, logprob in zip(ready, tokens.tolist(), logprobs.tolist(), strict=True):
            s.ids.append(token)
            s.logprobs.append(logprob)
            s.pending = [token]

    def _forward(self, work: list[tuple[list[int], int, list[int], _Prefix | None]]) -> Tensor:
        """The hidden rows [T, C] of packed (tokens, past, pages, prefix); their keys and values enter the cache."""
        device = self.model.device
        prefixes = list({id(p): p for *_, p in work if p is not None and p.ids}.values())
        number = {id(p): g for g, p in enumerate(prefixes)}
        prefix_of = [number.get(id(p), -1) for *_, p in work]
        behind = [len(prefixes[g].ids) if g >= 0 else 0 for g in prefix_of]
        places = [(pages, i) for tokens, past, pages, _ in work for i in range(past, past + len(tokens))]
        positions = [b + i for (tokens, past, *_), b in zip(work, behind, strict=True) for i in range(past, past + len(tokens))]

        def ints(values: list, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def table(rows: list[list[int]]) -> Tensor:
            width = max(map(len, rows), default=0)
            return ints([row + [0] * (width - len(row)) for row in rows])

        sequences = Sequences(
            cu_q=ints([0, *accumulate(len(tokens) for tokens, *_ in work)]),
            past=ints([past for _, past, *_ in work]),
            prefix_of=ints(prefix_of),
            prefix_len=ints([len(p.ids) for p in prefixes]),
            prefix_start=ints([-1] * len(prefixes)),
            max_q=max(len(tokens) for tokens, *_ in work),
            max_k=max(b + past + len(tokens) for (tokens, past, *_), b in zip(work, behind, strict=True)),
            block_table=table([pages for *_, pages, _ in work]),
            prefix_table=table([p.pages for p in prefixes]),
            slots=ints([self.cache.slot(pages, i) for pages, i in places], torch.int64),
        )
        ids = ints([token for tokens, *_ in work for token in tokens], torch.int64)
        return self.model.hidden(ids, ints(positions), sequences, self.cache)

    def _has_ended(self, sequence: _Running) -> bool:
        ids = sequence.ids
        return bool(ids) and (ids[-1] in self.tokenizer.stop_ids or len(ids) == sequence.request.sampling.max_new_tokens)

    def _completion(self, sequence: _Running) -> Completion:
        stopped = sequence.ids[-1] in self.tokenizer.stop_ids
        ids = sequence.ids[:-1] if stopped else sequence.ids
        reason = "stop" if stopped else "length"
        return Completion(sequence.request, self.tokenizer.decode(ids), ids, sequence.logprobs, reason, sequence.prompt_tokens)

