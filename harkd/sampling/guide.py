"""An answer that is known but for a few choices, compiled to tokens; and the way through it.

An answer is known texts and choices in turn, each choice a tuple of options. Tokens do not end where texts and options end: the quote
before an option, or what closes it, may belong to its tokens. So whole answers are tokenised, with every option in every choice's place,
the first options elsewhere, and what all options of a choice share is taken off on both sides:

    tokens(choice c = option o) = shared beginning | branch(c, o) | shared end
    trie(c) = {branch(c, o) + the known tokens up to the branches of choice c + 1: for all o}

What closes an option is part of its way through the trie: no option is the beginning of another. It holds for tokenizers that work word by
word, as Qwen3's does, where an option changes no token further away than the known text beside it.

    p(o | answer so far) = product over the branching nodes on o's way of p(token) / sum of p(token') over the node's children
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(eq=False)
class Node:
    """A place in a trie: the options that lie behind it, and the tokens that lead on."""

    options: list[int] = field(default_factory=list)
    children: dict[int, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Guide:
    """A compiled answer: the tokens before the first branch, a trie per choice, and the most tokens that an answer can have."""

    head: list[int]
    tries: list[Node]
    longest: int


def compile_guide(encode: Callable[[str], list[int]], answer: Sequence[str | tuple[str, ...]]) -> Guide:
    """Tokenise an answer of known texts and choices. All its choices have several options, or all have one."""
    first = [part if isinstance(part, str) else part[0] for part in answer]
    known = encode("".join(first))
    choices = []  # where in `known` each one's branches begin and end, and the branches
    for i, part in enumerate(answer):
        if not isinstance(part, str):
            whole = [encode("".join([*first[:i], option, *first[i + 1 :]])) for option in part]
            begin = shared(whole)
            end = shared([ids[begin:][::-1] for ids in whole])
            choices.append((begin, len(known) - end, [ids[begin : len(ids) - end] for ids in whole]))
    begins = [*(begin for begin, _, _ in choices), len(known)]
    ways = [[branch + known[end:after] for branch in branches] for (_, end, branches), after in zip(choices, begins[1:])]
    return Guide(known[: begins[0]], list(map(_trie, ways)), begins[0] + sum(max(map(len, choice)) for choice in ways))


def shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))


def _trie(rows: list[list[int]]) -> Node:
    root = Node(list(range(len(rows))))
    for option, row in enumerate(rows):
        node = root
        for token in row:
            node = node.children.setdefault(token, Node())
            node.options.append(option)
    return root


def _straight(node: Node) -> tuple[list[int], Node]:
    """The tokens from here to the next branch or leaf, and that."""
    tokens = []
    while len(node.children) == 1:
        ((token, node),) = node.children.items()
        tokens.append(token)
    return tokens, node


class Fork(NamedTuple):
    """A way that was not taken: it leaves the written tokens behind the first `at`, and `tokens` lead to its next branch."""

    at: int
    tokens: list[int]
    node: Node
    p: float  # of getting there
    known: dict[int, float]  # the options' probabilities of its choice


class Walk:
    """How far one completion has come in a guide.

    `node` is the branch at hand, None behind the answer. `probabilities` holds for each choice p(option) of those that are known: where
    several options lie behind a token that was not taken, they share what lacks of 1. With `exact` their branches become `forks`.
    """

    def __init__(self, guide: Guide, exact: bool = False) -> None:
        self.probabilities: list[dict[int, float]] = []
        self.forks: list[Fork] = []
        self._tries, self._exact = guide.tries, exact
        self._last: int | None = None  # the option of the choice before
        self._enter()

    def _enter(self) -> None:
        done = len(self.probabilities)
        self.node, self._p = self._tries[done] if done < len(self._tries) else None, 1.0
        if self.node is not None:
            self.probabilities.append({0: 1.0} if len(self.node.options) == 1 else {})

    def forced(self) -> list[int]:
        """The tokens up to the next branch, or to the end of the answer."""
        tokens: list[int] = []
        while self.node is not None and len(self.node.children) < 2:
            straight, self.node = _straight(self.node)
            tokens += straight
            if not self.node.children:
                self._last = self.node.options[0]  # of several that the tokenizer does not tell apart, the first
                self._enter()
        return tokens

    def guess(self) -> list[int]:
        """The tokens from the branch at hand on, if this choice and all that follow fall as the last one did; none before the first."""
        tokens: list[int] = []
        for node in [self.node, *self._tries[len(self.probabilities) :]] if self.node and not self._exact else []:
            if self._last not in node.options:
                break
            while node.children:
                token, node = next((token, child) for token, child in node.children.items() if self._last in child.options)
                tokens.append(token)
        return tokens

    def take(self, token: int, p: dict[int, float], at: int) -> None:
        """Go on with `token` from the branch at hand, behind `at` tokens; p: the probability of each token there."""
        self._see(Fork(at, [], self.node, self._p, self.probabilities[-1]), p, token)
        self.node, self._p = self.node.children[token], self._p * p[token]

    def see_fork(self, p: dict[int, float]) -> None:
        """Keep the probabilities at the branch of the last fork, which is done."""
        self._see(self.forks.pop(), p)

    def _see(self, way: Fork, p: dict[int, float], taken: int | None = None) -> None:
        for token, child in way.node.children.items():
            if len(child.options) == 1:
                way.known[child.options[0]] = way.p * p[token]
            elif self._exact and token != taken:
                straight, node = _straight(child)
                if node.children:  # else the tokenizer does not tell these options apart
                    self.forks.append(Fork(way.at, [*way.tokens, token, *straight], node, way.p * p[token], way.known))
