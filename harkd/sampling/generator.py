"""Many completions at once over one cache: continuous batching with chunked prefill and shared prefixes.

Each step is one packed forward of, for every running sequence, the tokens that its cache lacks: one for a sequence that is writing, a
stretch of the prompt for a new one, under a budget of tokens. Where a sequence's prompt is complete, its last row gives the next token. A
sequence that ends gives its pages to the next request at once. A prefix that requests share is computed once and its pages are read by all
of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from harkd.errors import UserError
from harkd.kernels.attention import Sequences
from harkd.qwen3.cache import Cache
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import Tokenizer
from harkd.sampling.request import Request, Sampling
from harkd.sampling.sampler import noise_key, sample, uniform


PAGE = 32  # tokens


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
    """A shared prefix: `past` of its ids lie in the cache, in `pages`, and `users` running sequences read them."""

    ids: list[int]
    pages: list[int] = field(default_factory=list)
    past: int = 0
    users: int = 0


@dataclass(eq=False)
class _Sequence:
    """A request and how far it has come: `past` of its own tokens lie in the cache, `pending` are the next to enter it."""

    request: Request
    key: int
    prefix: _Prefix
    pending: list[int]
    prompt_tokens: int  # with the prefix
    room: int  # own tokens, prompt and new ones, that it needs pages for
    pages: list[int] = field(default_factory=list)
    past: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Stretch(NamedTuple):
    """New tokens of a sequence or prefix, behind `past` own ones and a prefix in the cache."""

    tokens: list[int]
    past: int
    pages: list[int]
    prefix: _Prefix

    @property
    def begin(self) -> int:
        """The position of the first new token."""
        return len(self.prefix.ids) + self.past


class Generator:
    """Writes completions with one model and one tokenizer.

    Prefixes stay in the cache from one call of `generate` to the next: make a new Generator when the model's weights have changed.

    Args: batch: sequences that run at once; cache_tokens: room of the cache, shared by prefixes and sequences; page_size: tokens in a page;
    step_tokens: most tokens of one forward, at least one for each running sequence.
    """

    def __init__(
        self, model: Qwen3, tokenizer: Tokenizer, batch: int = 16, cache_tokens: int = 65536, page_size: int = PAGE, step_tokens: int = 1024
    ) -> None:
        if min(batch, cache_tokens, page_size, step_tokens) < 1:
            raise UserError("batch, cache_tokens, page_size and step_tokens of a Generator must be at least 1")
        self.model, self.tokenizer, self.batch, self.step_tokens = model, tokenizer, batch, max(step_tokens, batch)
        self.cache = Cache(model.config, -(-cache_tokens // page_size), page_size, model.dtype, model.device)
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)  # ids above are padding of the head
        self.prefixes: dict[str, _Prefix] = {}  # all that were asked for, in the cache or not

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield a completion for every request as it ends, in no fixed order; requests are taken from the iterable as places become free.

        Raises UserError for a request that can never run (see `check`), when those before it have ended and been yielded.
        """
        waiting, running, mistakes = map(self._prepare, requests), [], []
        first = _next(waiting, mistakes)
        try:
            while first or running:
                while first and len(running) < self.batch and self._admit(first):
                    running.append(first)
                    first = _next(waiting, mistakes)
                if not running:
                    raise UserError(f"the request {first.request.window!r} finds no room: other iterators hold the cache")
                self._step(running)
                ended = [sequence for sequence in running if self._has_ended(sequence)]
                running = [sequence for sequence in running if sequence not in ended]
                for sequence in ended:
                    self._release(sequence)
                yield from map(self._completion, ended)
            if mistakes:
                raise mistakes[0]
        finally:  # the caller may stop early
            for sequence in running:
                self._release(sequence)

    def _prepare(self, request: Request) -> _Sequence:
        """Tokenise a request, and see that it can run."""
        own = self.tokenizer.encode(request.prompt)
        if request.prefix not in self.prefixes:
            self.prefixes[request.prefix] = _Prefix(self.tokenizer.encode(request.prefix))
        prefix, key = self.prefixes[request.prefix], noise_key(request.sampling.seed, request.window, request.sample)
        check(request, len(prefix.ids), len(own), self.model.config.max_position_embeddings, len(self.cache.free), self.cache.page_size)
        return _Sequence(request, key, prefix, own, len(prefix.ids) + len(own), len(own) + request.sampling.max_new_tokens)

    def _admit(self, sequence: _Sequence) -> bool:
        """Give a sequence its pages, and compute its prefix where it is not in the cache.

        False: there is no room until another one ends.
        """
        if not self._fill(sequence.prefix):
            return False
        sequence.prefix.users += 1  # before the next allocation, which may drop unused prefixes
        pages = self._allocate(sequence.room)
        if pages is None:
            sequence.prefix.users -= 1
            return False
        sequence.pages = pages
        return True

    def _release(self, sequence: _Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.prefix.users -= 1

    @torch.inference_mode()
    def _fill(self, prefix: _Prefix) -> bool:
        """Compute what the cache lacks of a prefix. False: there is no room."""
        if not prefix.pages:
            pages = self._allocate(len(prefix.ids))
            if pages is None:
                return False
            prefix.pages = pages
        while prefix.past < len(prefix.ids):
            tokens = prefix.ids[prefix.past : prefix.past + self.step_tokens]
            self._forward([_Stretch(tokens, prefix.past, prefix.pages, _Prefix([]))])
            prefix.past += len(tokens)
        return True

    def _allocate(self, tokens: int) -> list[int] | None:
        """Pages for tokens; prefixes that nobody uses make room, the oldest first."""
        while (pages := self.cache.allocate(tokens)) is None:
            unused = next((prefix for prefix in self.prefixes.values() if prefix.pages and not prefix.users), None)
            if unused is None:
                return None
            self.cache.release(unused.pages)
            unused.pages, unused.past = [], 0
        return pages

    @torch.inference_mode()
    def _step(self, running: list[_Sequence]) -> None:
        """One forward: every sequence that writes gets its token in, prompts share what is left of the budget.

        Complete ones get their next token.
        """
        work, budget = [], self.step_tokens
        for sequence in sorted(running, key=lambda s: len(s.pending) > 1):  # those that write, then prompts in their order
            tokens = sequence.pending[:budget]
            if tokens:
                work.append((sequence, tokens))
                budget -= len(tokens)
        hidden = self._forward([_Stretch(tokens, s.past, s.pages, s.prefix) for s, tokens in work])
        ready, rows = [], accumulate(len(tokens) for _, tokens in work)
        for (sequence, tokens), row in zip(work, rows, strict=True):
            sequence.past += len(tokens)
            sequence.pending = sequence.pending[len(tokens) :]
            if not sequence.pending:
                ready.append((sequence, row - 1))
        for sampling in dict.fromkeys(s.request.sampling for s, _ in ready):
            self._write([(s, row) for s, row in ready if s.request.sampling == sampling], sampling, hidden)

    def _write(self, ready: list[tuple[_Sequence, int]], sampling: Sampling, hidden: Tensor) -> None:
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

    def _forward(self, work: list[_Stretch]) -> Tensor:
        """The hidden rows [T, C] of packed stretches; their keys and values enter the cache."""
        device = self.model.device
        ids = torch.tensor([token for stretch in work for token in stretch.tokens], device=device)
        positions = torch.tensor([stretch.begin + i for stretch in work for i in range(len(stretch.tokens))], device=device)
        return self.model.hidden(ids, positions, _plan(work, self.cache, device), self.cache)

    def _has_ended(self, sequence: _Sequence) -> bool:
        ids = sequence.ids
        return bool(ids) and (ids[-1] in self.tokenizer.stop_ids or len(ids) == sequence.request.sampling.max_new_tokens)

    def _completion(self, sequence: _Sequence) -> Completion:
        stopped = sequence.ids[-1] in self.tokenizer.stop_ids
        ids = sequence.ids[:-1] if stopped else sequence.ids
        reason = "stop" if stopped else "length"
        return Completion(sequence.request, self.tokenizer.decode(ids), ids, sequence.logprobs, reason, sequence.prompt_tokens)


def check(request: Request, prefix: int, own: int, positions: int, pages: int, page_size: int = PAGE) -> None:
    """Raise UserError where a request of so many prefix and own prompt tokens can never run, be the cache empty."""
    room = own + request.sampling.max_new_tokens
    needs = f"the request {request.window!r} needs {prefix + room} tokens ({prefix + own} of prompt, {request.sampling.max_new_tokens} new)"
    if not own:
        raise UserError(f"the request {request.window!r} has an empty prompt")
    if prefix + room > positions:
        raise UserError(f"{needs}, and the model has {positions} positions: lower --max-new-tokens")
    if -(-prefix // page_size) - (-room // page_size) > pages:
        raise UserError(f"{needs}, more than the cache holds: raise --cache-tokens (now {pages * page_size})")


def _next(waiting: Iterator[_Sequence], mistakes: list[UserError]) -> _Sequence | None:
    """The next sequence; None at the end, or where it cannot be had, which is kept: those that run are to end first."""
    try:
        return next(waiting, None)
    except UserError as mistake:
        mistakes.append(mistake)
        return None


def _plan(work: list[_Stretch], cache: Cache, device: torch.device) -> Sequences:
    """Who sees whom among packed stretches whose pasts and prefixes lie in the cache."""

    def ints(values: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def table(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows), default=0)
        return ints([row + [0] * (width - len(row)) for row in rows]).view(len(rows), width)

    lengths = [len(stretch.tokens) for stretch in work]
    prefixes = list(dict.fromkeys(stretch.prefix for stretch in work if stretch.prefix.ids))
    number = {prefix: g for g, prefix in enumerate(prefixes)}
    return Sequences(
        cu_q=ints([0, *accumulate(lengths)]),
        past=ints([stretch.past for stretch in work]),
        prefix_of=ints([number.get(stretch.prefix, -1) for stretch in work]),
        prefix_len=ints([len(prefix.ids) for prefix in prefixes]),
        prefix_start=ints([-1] * len(prefixes)),
        max_q=max(lengths),
        max_k=max(stretch.begin + n for stretch, n in zip(work, lengths, strict=True)),
        block_table=table([stretch.pages for stretch in work]),
        prefix_table=table([prefix.pages for prefix in prefixes]),
        slots=ints(
            [cache.slot(stretch.pages, stretch.past + i) for stretch, n in zip(work, lengths, strict=True) for i in range(n)], torch.int64
        ),
    )
