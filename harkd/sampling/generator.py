"""Many completions at once over one cache: continuous batching with chunked prefill, shared prefixes, and answers that are guided.

Each step is one packed forward of, for every running sequence, the tokens that its cache lacks: one for a sequence that is writing, a
known stretch of a guided answer, a part of a prompt or of the prefix before it, under a budget of tokens. Where all tokens of a sequence
are in, its last row gives the next one. A sequence that ends gives its pages to the next request at once. A prefix that requests share is
computed once and its pages are read by all of them.

Pages: while there are enough a sequence takes all that it may come to need, one behind the other. When they run out, these go by and by:
pages that were taken in advance, prefixes that nobody uses, and the youngest sequence's, which is computed again when there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from harkd.errors import UserError
from harkd.qwen3.cache import cache_of
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import Tokenizer
from harkd.sampling.intake import Intake
from harkd.sampling.request import BATCH, Request, Sampling
from harkd.sampling.sampler import sample, uniform
from harkd.sampling.sequence import Run, Sequence, pack

PAGE = 32  # tokens


@dataclass(frozen=True)
class Completion:
    """What was written: ids without the stop token, "stop" or "length", and the logprob of every token, the stop token's too.

    In a guided answer a known token's logprob is 0, a chosen one's is that among the tokens it was chosen from; `probabilities` has for
    each choice {option: p} (see sampling/guide.py).
    """

    request: Request
    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int
    probabilities: list[dict[int, float]] | None = None


class Generator:
    """Writes completions with one model and one tokenizer.

    Prefixes stay in the cache from one call of `generate` to the next: make a new Generator when the model's weights have changed.

    Args: batch: sequences that run at once; cache_tokens: room of the cache, shared by prefixes and sequences, by default what the free
    memory allows; page_size: tokens in a page; step_tokens: most tokens of one forward; it is halved when a step finds no memory.
    """

    def __init__(
        self, model: Qwen3, tokenizer: Tokenizer, batch: int = BATCH, cache_tokens: int | None = None, page_size: int = PAGE,
        step_tokens: int = 1024,
    ) -> None:  # fmt: skip
        if min(batch, page_size, step_tokens) < 1 or (cache_tokens is not None and cache_tokens < 1):
            raise UserError("batch, cache_tokens, page_size and step_tokens of a Generator must be at least 1")
        self.model, self.tokenizer, self.batch, self.step_tokens = model, tokenizer, batch, max(step_tokens, batch)
        most = (batch + 1) * model.config.max_position_embeddings  # every place full, and prefixes of as much
        self.cache = cache_of(model.config, cache_tokens, most, page_size, model.dtype, model.device)
        pages = [len(self.cache.free) * (rank == model.group.rank) for rank in range(model.group.size)]
        del self.cache.free[int(min(model.group.sum(pages))) :]  # processes that hold one model share out alike
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)  # ids above are padding of the head
        self.intake = Intake(tokenizer, model.config.max_position_embeddings, len(self.cache.free), page_size)
        self.active: list[Sequence] = []  # those that hold pages, of all iterators
        self.lock = Lock()  # for callers in several threads, who take turns

    @property
    def prefixes(self) -> dict[str, Run]:
        """All prefixes that were asked for, in the cache or not."""
        return self.intake.prefixes

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield a completion for every request as it ends, in no fixed order; requests are taken from the iterable as places become free.

        Raises UserError for a request that can never run (see sampling/intake.py), when those before it have ended and been yielded.
        """
        return self._run(map(self.intake.open, requests))

    def score(self, given: Iterable[tuple[Request, list[int]]]) -> Iterator[Completion]:
        """As `generate`, but nothing is drawn: each completion has the given ids and the logprob of each, as the model would write them."""
        return self._run(self.intake.open(request, ids) for request, ids in given)

    def _run(self, waiting: Iterator[Sequence]) -> Iterator[Completion]:
        running: list[Sequence] = []  # the oldest first
        mistakes: list[UserError] = []
        first = _next(waiting, mistakes)
        try:
            while first or running:
                room = all(sequence.pages or self._admit(sequence) for sequence in running)  # those that lost their pages, first
                while room and first and len(running) < self.batch and self._admit(first):
                    running.append(first)
                    first = _next(waiting, mistakes)
                self._make_room(running)
                ready = [sequence for sequence in running if sequence.pages and not sequence.ended]
                if ready:
                    self._step(ready)
                elif not any(sequence.ended for sequence in running):  # as an answer without any choice has from the start
                    raise UserError(f"the request {(running or [first])[0].request.window!r} finds no room: other iterators hold the cache")
                ended = [sequence for sequence in running if sequence.ended]
                running = [sequence for sequence in running if not sequence.ended]
                for sequence in ended:
                    self._park(sequence)
                yield from map(self._completion, ended)
            if mistakes:
                raise mistakes[0]
        finally:  # the caller may stop early
            for sequence in running:
                self._park(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence and its prefix their pages. False: there is no room until another one ends."""
        prefix = sequence.prefix
        if prefix.tokens and not prefix.pages:
            prefix.pages = self._allocate(len(prefix.tokens)) or []
            if not prefix.pages:
                return False
        prefix.users += 1  # before the next allocation, which may drop unused prefixes
        # where it is tight, leave every other sequence a page to grow into
        sequence.pages = self.cache.allocate(sequence.room) or self._allocate(len(sequence.tokens), len(self.active)) or []
        if sequence.pages:
            self.active.append(sequence)
        else:
            prefix.users -= 1
        return bool(sequence.pages)

    def _park(self, sequence: Sequence) -> None:
        """Take a sequence's pages away, if it has any: what it has written stays, and enters the cache again when it gets others."""
        if sequence.pages:
            self.cache.release(sequence.pages)
            sequence.pages, sequence.past = [], 0
            sequence.prefix.users -= 1
            self.active.remove(sequence)

    def _make_room(self, running: list[Sequence]) -> None:
        """See that all that run have pages for their tokens, the oldest first; the youngest make room."""
        for sequence in running:
            while sequence.pages and (lack := len(sequence.tokens) - len(sequence.pages) * self.cache.page_size) > 0:
                more = self._allocate(lack)
                if more:
                    sequence.pages += more
                else:
                    self._park(next(one for one in reversed(running) if one.pages))

    def _allocate(self, tokens: int, spare: int = 0) -> list[int] | None:
        """Pages for tokens, where that leaves `spare` more free; pages taken in advance and unused prefixes make room."""
        size = self.cache.page_size
        need = -(-tokens // size)
        while (pages := self.cache.allocate((need + spare) * size)) is None:
            unused = next((prefix for prefix in self.prefixes.values() if prefix.pages and not prefix.users), None)
            ahead = next((one for one in self.active if len(one.pages) > -(-len(one.tokens) // size)), None)
            if ahead:
                keep = -(-len(ahead.tokens) // size)
                self.cache.release(ahead.pages[keep:])
                del ahead.pages[keep:]
            elif unused:
                self.cache.release(unused.pages)
                unused.pages, unused.past = [], 0
            else:
                return None
        self.cache.release(pages[need:])
        return pages[:need]

    @torch.inference_mode()
    def _step(self, running: list[Sequence]) -> None:
        """One forward: every sequence that writes gets its token in, prefixes and prompts share what is left of the budget.

        Complete ones get their next token.
        """
        work: dict[Run, int] = {}
        budget = self.step_tokens
        for sequence in sorted(running, key=lambda one: len(one.tokens) - one.past > 1):  # those that write, then the others in their order
            for run in (sequence.prefix, sequence):
                count = min(budget, len(run.tokens) - run.past)
                prefix = run.prefix  # which must be in, or come in by this very step
                if count and run not in work and (not prefix or prefix.past + work.get(prefix, 0) == len(prefix.tokens)):
                    work[run] = count
                    budget -= count
        try:
            hidden = self.model.hidden(*pack(work, self.cache, self.model.device), self.cache)
            self._read(work, hidden)
        except RuntimeError as error:
            self._spare_memory(error, sum(work.values()))
            for run in running:  # those that were to get a token come again
                run.past -= run.past == len(run.tokens) and not run.given

    def _read(self, work: dict[Run, int], hidden: Tensor) -> None:
        """Book what a step computed, and let those whose tokens are all in go on."""
        alike: dict[tuple[Sampling, bool], list[tuple[Sequence, int]]] = {}  # sequences to be drawn for together, with their last rows
        row = 0
        for run, count in work.items():
            if isinstance(run, Sequence) and run.given:
                self._judge(run, hidden[row : row + count])
            run.past, row = run.past + count, row + count
            if isinstance(run, Sequence) and not run.given and run.past == len(run.tokens):
                alike.setdefault((run.request.sampling, run.walk is None), []).append((run, row - 1))
        for ready in alike.values():
            self._write(ready, hidden)

    def _spare_memory(self, error: RuntimeError, tokens: int) -> None:
        """Halve the budget where a step of so many tokens found no memory; any other error is raised."""
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise error
        if self.model.group.size > 1:  # the others wait in the middle of this step
            raise UserError(f"there is no memory for a step of {tokens} tokens in one of the processes: lower --cache-tokens") from error
        if tokens == 1:
            raise UserError("there is no memory for a step of a single token: lower --cache-tokens") from error
        self.step_tokens = tokens // 2

    def _judge(self, sequence: Sequence, hidden: Tensor) -> None:
        """Keep the logprobs of those given tokens that these rows, the next of the sequence, foretell."""
        first = max(sequence.begin + len(sequence.logprobs) - 1 - sequence.past, 0)  # some may be known from before it lost its pages
        targets = sequence.tokens[sequence.past + first + 1 : sequence.past + len(hidden) + 1]
        if targets:
            rows, targets = hidden[first : first + len(targets)], torch.tensor(targets, device=hidden.device)
            sequence.logprobs += (-self.model.nll(rows, targets, self.vocab_size)).tolist()

    def _write(self, ready: list[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Draw the next token of sequences whose last hidden row is given, all by the same settings and all guided or none."""
        sequences, rows = [one for one, _ in ready], hidden[[row for _, row in ready]]
        sampling, written, device = sequences[0].request.sampling, None, hidden.device
        guided = sequences[0].walk is not None
        if guided:
            ids = sorted({token for one in sequences for token in one.branch})  # nothing else is computed
            outside = torch.tensor([[token not in one.branch for token in ids] for one in sequences], device=device)
            logits = self.model.head(rows, ids).masked_fill(outside, -torch.inf)  # [B, tokens at these branches]
        else:
            ids, logits = range(self.vocab_size), self.model.head(rows)[:, : self.vocab_size]  # [B, V]
        if sampling.presence_penalty:
            written = torch.zeros(len(sequences), self.model.config.vocab_size, dtype=torch.bool, device=device)
            for row, one in enumerate(sequences):
                written[row, one.tokens[one.begin :]] = True
            written = written[:, ids] if guided else written[:, : self.vocab_size]
        keys = torch.tensor([one.key for one in sequences], device=device)
        positions = torch.tensor([len(one.tokens) - one.begin for one in sequences], device=device)
        drawn, logprobs = sample(logits, sampling, uniform(keys, positions), written)
        drawn = self.model.group.first(drawn)  # processes that hold one model must go the same way
        p = logits.softmax(-1).tolist() if guided else [None] * len(sequences)
        for one, index, logprob, of_branch in zip(sequences, drawn.tolist(), logprobs.tolist(), p, strict=True):
            if guided:
                one.choose(ids[index], logprob, dict(zip(ids, of_branch)))
            else:
                self.intake.follow(one, index, logprob)

    def _completion(self, one: Sequence) -> Completion:
        ids = one.tokens[one.begin :]
        if one.walk is None and not one.given and ids[-1] in self.tokenizer.stop_ids:
            ids = ids[:-1]
        text, prompt_tokens = self.tokenizer.decode(ids), len(one.prefix.tokens) + one.begin
        probabilities = one.walk and one.walk.probabilities
        return Completion(one.request, text, ids, one.logprobs, one.finish_reason or "stop", prompt_tokens, probabilities)


def _next(waiting: Iterator[Sequence], mistakes: list[UserError]) -> Sequence | None:
    """The next sequence; None at the end, or where it cannot be had, which is kept: those that run are to end first."""
    try:
        return next(waiting, None)
    except UserError as mistake:
        mistakes.append(mistake)
        return None
