"""Several tokens of sequences that write free text, one behind the other, while the host waits for none of them.

A step needs only what the step before has drawn, which stays on the device:

    slot = block_table[past // P] * P + past % P,  nowhere from `places` on       P tokens in a page
    token, logprob = sample(head(hidden(token)), uniform(key, count))
    past += 1,  position += 1,  count += 1

On a GPU such a step is captured once in a CUDA graph, of few sizes: numbers of sequences and keys are rounded up to powers of two, and rows
behind the last sequence are empty. So a step is one launch instead of some hundred. Tokens are those of single steps but for rounding: the
noise of a token is a function of its address (sampler.py). What was drawn behind the end of a text, less than a burst, is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from harkd.kernels.attention import HEAD_DIMS, Sequences
from harkd.kernels.backend import use_triton
from harkd.qwen3.cache import Cache
from harkd.qwen3.config import Qwen3MoeConfig
from harkd.qwen3.model import Qwen3
from harkd.sampling.request import Sampling
from harkd.sampling.sampler import sample, uniform
from harkd.sampling.sequence import Sequence, pack, written_by

GRAPHS = 32  # at most; the oldest makes room
LEAST_KEYS = 1024  # of a prefix, and own ones, for which a graph is made


@dataclass(frozen=True, eq=False)
class Board:
    """What a step reads and moves on, on the device; int64 where nothing else is said."""

    token: Tensor  # [B] the last of each sequence, which is to enter the cache
    position: Tensor  # [B] its place behind prefix and past
    key: Tensor  # [B] of the noise
    count: Tensor  # [B] tokens written
    places: Tensor  # [B] own tokens that have a place in the cache
    step: Tensor  # [1] steps of this burst so far
    drawn: Tensor  # [B, steps]
    logprobs: Tensor  # [B, steps] float32, float64 for float64 weights
    written: Tensor  # [B, V] bool, the tokens already written; [B, 0] where none is penalised
    plan: Sequences


class Burst:
    """Bursts of one model over one cache; ids from `vocab_size` on are not drawn."""

    def __init__(self, model: Qwen3, cache: Cache, vocab_size: int) -> None:
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self.graphs: dict[tuple[int | Sampling, ...], tuple[Board, Callable[[], None]]] | None = {} if _capturable(model) else None
        self.pool = None if self.graphs is None else torch.cuda.graph_pool_handle()  # one for all, of which one runs at a time

    @torch.inference_mode()
    def write(self, sequences: list[Sequence], sampling: Sampling, steps: int) -> list[list[tuple[int, float]]]:
        """The next (token, logprob) of each sequence, up to `steps` and one at least; every sequence lacks one token in the cache, and has
        a place for it.
        """
        left = [len(one.pages) * self.cache.page_size - one.past for one in sequences]
        if self.graphs is None:  # the reference stores every token, a graph's kernels none that has no place
            steps = min(steps, *left)
        board = self._board(sequences, sampling, steps)
        advance = partial(self._advance, board, sampling)
        if self.graphs is not None:
            board, advance = self._graph(board, sampling)
        for _ in range(steps):
            advance()
        found = zip(board.drawn.tolist(), board.logprobs.tolist(), left, strict=False)  # a graph's board has more rows
        return [list(zip(drawn, logprobs, strict=True))[:most] for drawn, logprobs, most in found]

    def forget(self) -> bool:
        """Give the graphs and their memory back; whether there were any."""
        if not self.graphs:
            return False
        self.graphs, self.pool = {}, self.pool and torch.cuda.graph_pool_handle()  # a new one: something may still lie in the old
        return True

    def _board(self, sequences: list[Sequence], sampling: Sampling, steps: int) -> Board:
        """Where these sequences stand."""
        device = self.model.device
        token, position, plan = pack({one: one.tokens[one.past :] for one in sequences}, self.cache, device)
        numbers = [(one.key, len(one.tokens) - one.begin, len(one.pages) * self.cache.page_size) for one in sequences]
        key, count, places = torch.tensor(numbers, device=device).T.contiguous()
        drawn = torch.zeros(len(token), steps, dtype=torch.int64, device=device)
        none = torch.zeros(len(token), 0, dtype=torch.bool, device=device)
        written = written_by(sequences, self.vocab_size, device) if sampling.presence_penalty else none
        logprobs = torch.zeros(drawn.shape, dtype=torch.promote_types(self.model.dtype, torch.float32), device=device)
        step = torch.zeros(1, dtype=torch.int64, device=device)
        plan = replace(plan, max_k=plan.max_k + steps - 1)
        return Board(token, position, key, count, places, step, drawn, logprobs, written, plan)

    def _advance(self, board: Board, sampling: Sampling) -> None:
        """One step, on the device alone."""
        plan, size = board.plan, self.cache.page_size
        page = plan.block_table.gather(1, (plan.past // size).long()[:, None])[:, 0]
        slots = (page.long() * size + plan.past % size).masked_fill(plan.past >= board.places, -1)
        hidden = self.model.hidden(board.token, board.position, replace(plan, slots=slots), self.cache)
        logits = self.model.head(hidden)[:, : self.vocab_size]
        token, logprobs = sample(logits, sampling, uniform(board.key, board.count), board.written if sampling.presence_penalty else None)
        token = self.model.group.first(token)  # processes that hold one model must go the same way
        at = board.step.expand(len(token), 1)
        board.drawn.scatter_(1, at, token[:, None])
        board.logprobs.scatter_(1, at, logprobs[:, None])
        if sampling.presence_penalty:
            board.written.scatter_(1, token[:, None], True)
        board.token.copy_(token)
        for number in (board.position, board.count, board.step, plan.past):
            number += 1

    def _graph(self, board: Board, sampling: Sampling) -> tuple[Board, Callable[[], None]]:
        """A graph for steps of so many sequences, keys and tokens, and its own board, on which these sequences stand now."""
        sizes = len(board.token), max(board.plan.max_k, LEAST_KEYS), max(board.plan.max_prefix, LEAST_KEYS)
        kind = *(1 << (n - 1).bit_length() for n in sizes), board.drawn.shape[1], sampling  # the next power of two
        if kind not in self.graphs:
            if len(self.graphs) == GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            own = _empty(board, *kind[:3], self.cache.page_size)
            self.graphs[kind] = own, captured(partial(self._advance, own, sampling), self.model.device, self.pool)
        own, advance = self.graphs[kind]
        for mine, given in zip(_tensors(own), _tensors(board), strict=True):
            common = tuple(map(slice, map(min, mine.shape, given.shape)))  # pages of tokens far ahead have no column
            mine.zero_()[common] = given[common]
        own.plan.cu_q[len(board.token) :] = len(board.token)
        return own, advance


def manner(sampling: Sampling) -> Sampling:
    """How tokens are drawn, and no more: the same for all settings that draw alike."""
    return replace(sampling, max_new_tokens=1, seed=0, max_thinking=None)


def captured(step: Callable[[], None], device: torch.device, pool: tuple[int, int]) -> Callable[[], None]:
    """A step as a CUDA graph over this pool of memory. It runs once before, for what is compiled or allocated at its first use."""
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                step()
        finally:
            torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            step()
    return graph.replay


def _capturable(model: Qwen3) -> bool:
    """Whether a step asks nothing of the host: the kernels serve its attention, no experts are counted, no process joins in."""
    weight = model.model.norm.weight
    served = model.config.head_dim in HEAD_DIMS and weight.dtype in (torch.float16, torch.bfloat16)
    counted = isinstance(model.config, Qwen3MoeConfig) or model.group.size > 1
    return weight.is_cuda and served and use_triton(model.backend, weight) and not counted


def _tensors(board: Board) -> list[Tensor]:
    """The tensors of a board and its plan, but for the slots, which each step makes."""
    parts = [getattr(part, one.name) for part in (board, board.plan) for one in fields(part) if one.name != "slots"]
    return [part for part in parts if isinstance(part, Tensor)]


def _empty(board: Board, rows: int, keys: int, prefix: int, page: int) -> Board:
    """A board for as many rows, without a sequence on it: nothing is stored in a step on it, and nothing read."""

    def larger(part: Tensor, *shape: int) -> Tensor:
        return torch.zeros(*shape, *part.shape[len(shape) :], dtype=part.dtype, device=part.device)

    plan = {one.name: getattr(board.plan, one.name) for one in fields(board.plan)}
    plan = {name: larger(part, rows) for name, part in plan.items() if isinstance(part, Tensor)}
    for name, tokens in (("block_table", keys), ("prefix_table", prefix)):
        plan[name] = larger(board.plan.block_table, rows, -(-tokens // page))
    plan |= {"cu_q": larger(board.plan.cu_q, rows + 1), "slots": None, "max_q": 1, "max_k": keys, "max_prefix": prefix}
    parts = {one.name: getattr(board, one.name) for one in fields(board) if one.name not in ("plan", "step")}
    return Board(**{name: larger(part, rows) for name, part in parts.items()}, step=board.step.clone(), plan=Sequences(**plan))
