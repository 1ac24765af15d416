"""Who holds the pages of the cache: which sequences run, and which make room for others.

While there are enough a sequence takes all that it may come to need, one behind the other. When they run out, these go by and by: a prompt
that was kept for what may follow, pages that were taken in advance, prefixes that nobody uses, and the youngest sequence's, which is
computed again when there is room.
"""

from __future__ import annotations

from harkd.qwen3.cache import Cache, page_count
from harkd.sampling.guide import shared
from harkd.sampling.sequence import Run, Sequence


class Places:
    """The pages of `cache`, among sequences and `prefixes`."""

    def __init__(self, cache: Cache, prefixes: dict[str, Run]) -> None:
        self.cache, self.prefixes = cache, prefixes
        self.active: list[Sequence] = []  # those that hold pages, of all iterators
        self._kept: Sequence | None = None  # of these one that has ended, see `Sequence.kept`

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence and its prefix their pages. False: there is no room until another one ends."""
        if self._kept and self._kept.prefix is sequence.prefix:
            self._take_over(self._kept, sequence)
            return True
        prefix = sequence.prefix
        if prefix.tokens and not prefix.pages:
            prefix.pages = self._allocate(len(prefix.tokens)) or []
            if not prefix.pages:
                return False
        prefix.users += 1  # before the next allocation, which may drop unused prefixes
        # where it is tight, leave every other sequence a page to grow into
        others = len(self.active) - (self._kept is not None)
        sequence.pages = self.cache.allocate(sequence.room) or self._allocate(len(sequence.tokens), others) or []
        if sequence.pages:
            self.active.append(sequence)
        else:
            prefix.users -= 1
        return bool(sequence.pages)

    def _take_over(self, kept: Sequence, sequence: Sequence) -> None:
        """Give a sequence the place of the one that was kept, with what both begin with, and what it may come to need, if there is room."""
        needed = sequence.begin + len(sequence.logprobs) if sequence.given else len(sequence.tokens)  # the token before gives the next one
        alike = shared([kept.tokens[: kept.past], sequence.tokens[: needed - 1]])
        sequence.pages, sequence.past, kept.pages, self._kept = kept.pages, alike, [], None
        self.active[self.active.index(kept)] = sequence
        sequence.pages += self.cache.allocate(max(0, sequence.room - len(sequence.pages) * self.cache.page_size)) or []

    def end(self, sequence: Sequence) -> None:
        """Take an ended sequence's pages away, or keep them in the place of those that were kept before."""
        if sequence.kept and sequence.pages:
            self._drop_kept()
            self._kept = sequence
        else:
            self.park(sequence)

    def park(self, sequence: Sequence) -> None:
        """Take a sequence's pages away, if it has any: what it has written stays, and enters the cache again when it gets others."""
        if sequence.pages:
            self.cache.release(sequence.pages)
            sequence.pages, sequence.past = [], 0
            sequence.prefix.users -= 1
            self.active.remove(sequence)

    def make_room(self, running: list[Sequence]) -> None:
        """See that all that run have pages for their tokens, the oldest first; the youngest make room."""
        for sequence in running:
            while sequence.pages and (lack := len(sequence.tokens) - len(sequence.pages) * self.cache.page_size) > 0:
                more = self._allocate(lack)
                if more:
                    sequence.pages += more
                else:
                    self.park(next(one for one in reversed(running) if one.pages))

    def grow(self, sequences: list[Sequence], ahead: int) -> None:
        """Give sequences pages for `ahead` more tokens in the cache, of those that they may come to need, where pages are free."""
        for sequence in sequences:
            lack = min(sequence.past + ahead, sequence.room) - len(sequence.pages) * self.cache.page_size
            sequence.pages += self.cache.allocate(max(lack, 0)) or []

    def _drop_kept(self) -> None:
        if self._kept:
            self.park(self._kept)
            self._kept = None

    def _allocate(self, tokens: int, spare: int = 0) -> list[int] | None:
        """Pages for tokens, where that leaves `spare` more free; pages taken in advance and unused prefixes make room."""
        size = self.cache.page_size
        need = page_count(tokens, size)
        while (pages := self.cache.allocate((need + spare) * size)) is None:
            unused = next((prefix for prefix in self.prefixes.values() if prefix.pages and not prefix.users), None)
            ahead = next((one for one in self.active if len(one.pages) > page_count(len(one.tokens), size)), None)
            if self._kept:
                self._drop_kept()
            elif ahead:
                keep = page_count(len(ahead.tokens), size)
                self.cache.release(ahead.pages[keep:])
                del ahead.pages[keep:]
            elif unused:
                self.cache.release(unused.pages)
                unused.pages, unused.past = [], 0
            else:
                return None
        self.cache.release(pages[need:])
        return pages[:need]
