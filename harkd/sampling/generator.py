"""Many completions at once over one cache: continuous batching with chunked prefill, shared prefixes, and answers that are guided.

Each step is one packed forward of, for every running sequence, the tokens that its cache lacks: one for a sequence that is writing, a
known stretch of a guided answer, a part of a prompt or of the prefix before it, under a budget of tokens. Where all tokens of a sequence
are in, its last row gives the next one. A sequence that ends gives its pages to the next request at once. A prefix that requests share is
computed once and its pages are read by all of them (pages: see places.py).

A small step takes in more of a guided answer than is known: the rest of it, as if every choice to come fell as the last one did, which is
likely where events follow each other. Each choice is then made from the row before it, as ever, and the first that falls otherwise ends
what the step is good for. So nothing but the number of steps depends on the guess.

Where `burst` is more than one, as on a GPU, those that write free text go on by themselves, so many tokens at a time (burst.py), and steps
are for all others.
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
from harkd.sampling.burst import Burst, manner
from harkd.sampling.intake import Intake
from harkd.sampling.memory import halved, lacks_memory, rehearse
from harkd.sampling.places import Places
from harkd.sampling.request import BATCH, Request, Sampling
from harkd.sampling.sampler import sample, uniform
from harkd.sampling.sequence import Run, Sequence, pack, written_by

PAGE = 32  # tokens
STEP = 1024, 8192  # most tokens of a step, on a CPU and on a GPU: there 1,024 of prompts let fewer sequences begin than a burst ends
BURST = 8  # tokens: the host is asked once for so many, and as many less one may be written for nothing
SMALL = 128  # tokens: a step of so many takes a GPU hardly longer than one of a few (a CPU does take longer)


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
    memory allows; page_size: tokens in a page; step_tokens: most tokens of one forward, by default as STEP says, halved when a step finds
    no memory; burst: tokens by which free text goes on at a time, by default BURST on a GPU and 1 elsewhere.
    """

    def __init__(
        self, model: Qwen3, tokenizer: Tokenizer, batch: int = BATCH, cache_tokens: int | None = None, page_size: int = PAGE,
        step_tokens: int | None = None, burst: int | None = None,
    ) -> None:  # fmt: skip
        if min(batch, page_size, *(given for given in (cache_tokens, step_tokens, burst) if given is not None)) < 1:
            raise UserError("batch, cache_tokens, page_size, step_tokens and burst of a Generator must be at least 1")
        usual = (STEP[1], BURST) if model.device.type == "cuda" else (STEP[0], 1)
        self.model, self.tokenizer, self.batch, self.step_tokens = model, tokenizer, batch, max(step_tokens or usual[0], batch)
        most = (batch + 1) * model.config.max_position_embeddings  # every place full, and prefixes of as much
        self.cache = cache_of(model.config, cache_tokens, most, page_size, model.dtype, model.device)
        pages = [len(self.cache.free) * (rank == model.group.rank) for rank in range(model.group.size)]
        del self.cache.free[int(min(model.group.sum(pages))) :]  # processes that hold one model share out alike
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)  # ids above are padding of the head
        self.intake = Intake(tokenizer, model.config.max_position_embeddings, len(self.cache.free), page_size)
        self.places = Places(self.cache, self.intake.prefixes)
        self.burst, self.ahead = Burst(model, self.cache, self.vocab_size), burst or usual[1]
        self.rows = batch  # sequences of a burst
        self.lock = Lock()  # for callers in several threads, who take turns
        if model.group.size > 1:
            self.step_tokens = rehearse(model, self.cache, self.step_tokens, batch)

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

    def prepare(self, request: Request) -> None:
        """Compute a prompt, and keep it in the cache for the next request, of which what begins alike need not be computed again."""
        sequence = self.intake.open(request, [])
        sequence.kept = True
        list(self._run(iter([sequence])))

    def _run(self, waiting: Iterator[Sequence]) -> Iterator[Completion]:
        running: list[Sequence] = []  # the oldest first
        mistakes: list[UserError] = []
        first = _next(waiting, mistakes)
        try:
            while first or running:
                room = all(sequence.pages or self.places.admit(sequence) for sequence in running)  # those that lost their pages, first
                while room and first and len(running) < self.batch and self.places.admit(first):
                    running.append(first)
                    first = _next(waiting, mistakes)
                self.places.make_room(running)
                ready = [sequence for sequence in running if sequence.pages and not sequence.ended]
                parts: tuple[list[Sequence], list[Sequence]] = [], []
                for sequence in ready:
                    parts[sequence.writes and self.ahead > 1].append(sequence)
                if parts[0]:
                    self._step(parts[0])
                if parts[1]:
                    self._burst(parts[1])
                if not ready and not any(sequence.ended for sequence in running):  # as an answer without any choice has from the start
                    raise UserError(f"the request {(running or [first])[0].request.window!r} finds no room: other iterators hold the cache")
                ended = [sequence for sequence in running if sequence.ended]
                running = [sequence for sequence in running if not sequence.ended]
                for sequence in ended:
                    self.places.end(sequence)
                yield from map(self._completion, ended)
            if mistakes:
                raise mistakes[0]
        finally:  # the caller may stop early
            for sequence in running:
                self.places.park(sequence)

    @torch.inference_mode()
    def _step(self, running: list[Sequence]) -> None:
        """One forward: every sequence that writes gets its tokens in, prefixes and prompts share what is left of the budget.

        Complete ones get their next token; guided ones as many as were guessed right.
        """
        work: dict[Run, list[int]] = {}
        budget = self.step_tokens
        for sequence in sorted(running, key=lambda one: len(one.tokens) - one.past > 1):  # those that write, then the others in their order
            for run in (sequence.prefix, sequence):
                new = run.tokens[run.past : run.past + budget]
                prefix = run.prefix  # which must be in, or come in by this very step
                if new and run not in work and (not prefix or prefix.past + len(work.get(prefix, ())) == len(prefix.tokens)):
                    work[run] = new
                    budget -= len(new)
        guesses = self._guess(work)
        entering = {run: new + guesses.get(run, []) for run, new in work.items()}
        try:
            hidden = self.model.hidden(*pack(entering, self.cache, self.model.device), self.cache)
            self._read(work, guesses, hidden)
        except RuntimeError as error:
            self.step_tokens = self._fewer(error, sum(map(len, entering.values())))
            for run in running:  # those that were to get a token come again
                run.past -= run.past == len(run.tokens) and not run.given

    def _burst(self, writers: list[Sequence]) -> None:
        """Let free text go on by up to `ahead` tokens, and take of them those that are followed by free text."""
        alike: dict[Sampling, list[Sequence]] = {}
        for one in writers[: self.rows]:
            alike.setdefault(manner(one.request.sampling), []).append(one)
        for sampling, some in alike.items():
            self.places.grow(some, self.ahead)
            try:
                found = self.burst.write(some, sampling, self.ahead)
            except RuntimeError as error:  # they come again
                if not (lacks_memory(error) and self.burst.forget()):  # graphs hold memory too
                    self.rows = self._fewer(error, len(some))
                continue
            for one, drawn in zip(some, found, strict=True):
                for token, logprob in drawn:
                    one.past += 1
                    self.intake.follow(one, token, logprob)
                    if not one.writes:
                        break

    def _guess(self, work: dict[Run, list[int]]) -> dict[Run, list[int]]:
        """What guided answers may go on with, in a step so small that more tokens take hardly longer."""
        guesses: dict[Run, list[int]] = {}
        spare = min(self.step_tokens, SMALL) - sum(map(len, work.values()))
        for run, new in work.items():
            if isinstance(run, Sequence) and run.walk and run.past + len(new) == len(run.tokens) and spare > 0:
                guesses[run] = run.walk.guess()[: min(spare, len(run.pages) * self.cache.page_size - len(run.tokens))]
                spare -= len(guesses[run])
        return guesses

    def _read(self, work: dict[Run, list[int]], guesses: dict[Run, list[int]], hidden: Tensor) -> None:
        """Book what a step computed, and let those whose tokens are all in go on, for as long as they do as was guessed."""
        ready: dict[Sequence, int] = {}  # the row of a sequence's last token
        row = 0
        for run, new in work.items():
            if isinstance(run, Sequence) and run.given:
                self._judge(run, hidden[row : row + len(new)])
            run.past, row = run.past + len(new), row + len(new)
            if isinstance(run, Sequence) and not run.given and run.past == len(run.tokens):
                ready[run] = row - 1
            row += len(guesses.get(run, ()))
        while ready:
            alike: dict[tuple[Sampling, bool], list[tuple[Sequence, int]]] = {}  # to be drawn for together
            for one, last in ready.items():
                alike.setdefault((one.request.sampling, one.walk is None), []).append((one, last))
            for some in alike.values():
                self._write(some, hidden)
            right = {one: one.confirm(guesses[one]) for one in ready if one in guesses}
            guesses = {one: guesses[one][n:] for one, n in right.items()}
            ready = {one: ready[one] + n for one, n in right.items() if n}

    def _fewer(self, error: RuntimeError, tokens: int) -> int:
        """The tokens to go on with where a step of so many found no memory; any other error is raised."""
        if not lacks_memory(error):
            raise error
        if self.model.group.size > 1:  # the others wait in the middle of this step
            raise UserError(f"there is no memory for a step of {tokens} tokens in one of the processes: lower --cache-tokens") from error
        return halved(tokens)

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
            ids, logits = slice(None), self.model.head(rows)[:, : self.vocab_size]  # [B, V]
        if sampling.presence_penalty:
            written = written_by(sequences, self.vocab_size, device)[:, ids]
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
