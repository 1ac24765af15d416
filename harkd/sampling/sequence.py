"""What runs in a generator, and how a step of it is packed.

A run is a list of tokens of which the first `past` lie in the cache: a prefix that requests share, or what a sequence has of its own behind
its prefix. All else follows from that: the tokens behind `past` are the next to enter the cache, and a run whose pages were taken away is
computed again from its first token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from harkd.kernels.attention import Sequences
from harkd.qwen3.cache import Cache
from harkd.sampling.guide import Walk, shared
from harkd.sampling.request import Request


@dataclass(eq=False)
class Run:
    """Tokens that lie in the cache or are to enter it, in `pages`; `users` sequences read a prefix."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    past: int = 0
    users: int = 0
    prefix: Run | None = None


@dataclass(eq=False, kw_only=True)
class Sequence(Run):
    """A request and how far it has come: its own tokens are the prompt's and, from `begin` on, what was written or is `given`."""

    request: Request
    key: int
    begin: int
    room: int  # own tokens at most
    closes_at: int | None = None  # reasoning is closed when so many tokens are written
    given: bool = False  # nothing is written: the logprobs of what stands there are asked for
    kept: bool = False  # behind its end it keeps its pages, for one that begins alike
    walk: Walk | None = None  # through the guided answer, once it has begun
    logprobs: list[float] = field(default_factory=list)
    real: list[int] | None = None  # while `tokens` are a fork: the tokens written
    finish_reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be computed."""
        if self.given:
            return self.past == len(self.tokens)
        return bool(self.finish_reason) if self.walk is None else self.walk.node is None and self.real is None

    @property
    def writes(self) -> bool:
        """Whether it writes free text and the cache lacks its last token alone."""
        free = self.walk is None and not self.given and not self.finish_reason
        return free and self.past == len(self.tokens) - 1 and self.prefix.past == len(self.prefix.tokens)

    def write(self, tokens: list[int], logprob: float = 0.0) -> None:
        """Append a drawn token, or tokens that had to follow, whose logprob is 0."""
        self.tokens += tokens
        self.logprobs += [logprob] * len(tokens)

    def choose(self, token: int, logprob: float, p: dict[int, float]) -> None:
        """Take a token at the branch at hand, and what follows it up to the next; on a fork see its probabilities only.

        Forks come first: each takes the place of what is written behind it, which enters the cache once more when they are done.
        """
        if self.real is None:
            self.walk.take(token, p, len(self.tokens))
            self.write([token], logprob)
            self.write(self.walk.forced())
        else:
            self.walk.see_fork(p)
        written = self.tokens if self.real is None else self.real
        if self.walk.forks:
            fork = self.walk.forks[-1]
            self._switch(written[: fork.at] + fork.tokens)
            self.real = written
        elif self.real is not None:
            self._switch(written)
            self.real = None

    def confirm(self, guess: list[int]) -> int:
        """Book what entered the cache as a guess and was written since: how many tokens, if more are to be written behind them, else 0."""
        new = self.tokens[self.past :]
        right = shared([new, guess])
        self.past += right
        return right if right == len(new) and not self.ended else 0

    @property
    def branch(self) -> dict[int, object]:
        """The tokens among which to choose."""
        return (self.walk.node if self.real is None else self.walk.forks[-1].node).children

    def _switch(self, tokens: list[int]) -> None:
        """Put other tokens in the place of these; those that both begin with stay in the cache."""
        self.past = min(self.past, shared([self.tokens, tokens]))
        self.tokens = tokens


def written_by(sequences: list[Sequence], vocab_size: int, device: torch.device) -> Tensor:
    """The tokens that each sequence has written, bool [B, V]."""
    pairs = [(row, id) for row, one in enumerate(sequences) for id in set(one.tokens[one.begin :])]
    written = torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=device)
    written[tuple(torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2).T)] = True
    return written


def pack(work: dict[Run, list[int]], cache: Cache, device: torch.device) -> tuple[Tensor, Tensor, Sequences]:
    """Ids [T], positions [T] and plan of a step in which the tokens `work[run]` enter the cache behind the past of each run.

    Pasts and prefixes lie in the cache, or enter it in this same step.
    """
    ints = partial(torch.tensor, dtype=torch.int32, device=device)

    def table(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows), default=0)
        return ints([row + [0] * (width - len(row)) for row in rows]).view(len(rows), width)

    places = [(run, run.past + i) for run, new in work.items() for i in range(len(new))]
    prefixes = list(dict.fromkeys(run.prefix for run in work if run.prefix and run.prefix.tokens))
    number = {prefix: g for g, prefix in enumerate(prefixes)}
    before = {run: len(run.prefix.tokens) if run.prefix else 0 for run in work}
    plan = Sequences(
        cu_q=ints([0, *accumulate(map(len, work.values()))]),
        past=ints([run.past for run in work]),
        prefix_of=ints([number.get(run.prefix, -1) for run in work]),
        prefix_len=ints([len(prefix.tokens) for prefix in prefixes]),
        prefix_start=ints([-1] * len(prefixes)),
        max_q=max(map(len, work.values())),
        max_k=max(run.past + len(new) for run, new in work.items()),
        max_prefix=max(before.values()),
        block_table=table([run.pages for run in work]),
        prefix_table=table([prefix.pages for prefix in prefixes]),
        slots=ints([cache.slot(run.pages, i) for run, i in places], dtype=torch.int64),
    )
    ids, positions = [token for new in work.values() for token in new], [before[run] + i for run, i in places]
    return ints(ids, dtype=torch.int64), ints(positions, dtype=torch.int64), plan
