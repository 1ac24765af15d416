"""From a request to a sequence that runs, and what must follow a token that was drawn.

A free completion ends at a stop token. A guided one is, with reasoning, `<think>\\n`, what the model thinks, and the answer behind the
`</think>`; the reasoning is closed for the model where it ends its turn without doing so, or has no more room. `max_thinking` closes a
thought in both.
"""

from __future__ import annotations

from harkd.errors import UserError
from harkd.qwen3.cache import page_count
from harkd.qwen3.template import CLOSE, OPEN
from harkd.qwen3.tokenizer import Tokenizer
from harkd.sampling.guide import Guide, Walk, compile_guide
from harkd.sampling.request import Request
from harkd.sampling.sampler import noise_key
from harkd.sampling.sequence import Run, Sequence


class Intake:
    """Tokenises requests for a model of `positions` positions over a cache of `pages` pages of `page_size` tokens."""

    def __init__(self, tokenizer: Tokenizer, positions: int, pages: int, page_size: int) -> None:
        self.tokenizer, self.positions, self.pages, self.page_size = tokenizer, positions, pages, page_size
        self.prefixes: dict[str, Run] = {}
        self._guides: dict[tuple[str | tuple[str, ...], ...], Guide] = {}
        self._opening, self._closing, self._blank = map(tokenizer.encode, (f"{OPEN}\n", f"\n{CLOSE}\n\n", "\n\n"))
        (self._open,), (self._close,) = map(tokenizer.encode, (OPEN, CLOSE))

    def open(self, request: Request, given: list[int] | None = None) -> Sequence:
        """A request as a sequence; with `given` those ids stand in the place of what would be written.

        Raises UserError where it can never run, be the cache empty.
        """
        own, sampling = self.tokenizer.encode(request.prompt), request.sampling
        if request.prefix not in self.prefixes:
            self.prefixes[request.prefix] = Run(self.tokenizer.encode(request.prefix))
        prefix, new, closes_at = self.prefixes[request.prefix], sampling.max_new_tokens, sampling.max_thinking
        if given is not None:
            new = len(given)
        elif request.answer:  # a thought is closed early enough for any answer
            thought = (len(self._opening) + 1) * request.thinking
            rest = len(self._closing) * request.thinking + self._guide(request).longest
            if thought + rest > new:
                takes = f"the guided answer to {request.window!r} takes up to {thought + rest} tokens"
                raise UserError(f"{takes}: raise --max-new-tokens (now {new})")
            closes_at = max(thought, new - rest if closes_at is None else min(closes_at, new - rest)) * request.thinking
            new = closes_at + rest
        self._check(request, len(prefix.tokens), len(own), new)
        key = noise_key(sampling.seed, request.window, request.sample)
        one = Sequence(own, prefix=prefix, request=request, key=key, begin=len(own), room=len(own) + new, closes_at=closes_at)
        if given is not None:
            one.given, one.tokens = True, own + given
        elif request.answer and request.thinking:
            one.write(self._opening)
        elif request.answer:
            self._answer(one)
        return one

    def follow(self, one: Sequence, token: int, logprob: float) -> None:
        """Write a token that was drawn, and what must follow it."""
        one.write([token], logprob)
        count, stopped = len(one.tokens) - one.begin, token in self.tokenizer.stop_ids
        late = one.closes_at is not None and count >= one.closes_at
        if one.request.answer:
            if stopped:
                del one.tokens[-1], one.logprobs[-1]
            if stopped or late or token == self._close:
                one.write(self._blank if token == self._close else self._closing)
                self._answer(one)
        elif stopped or count == one.request.sampling.max_new_tokens:
            one.finish_reason = "stop" if stopped else "length"
        elif late:
            written, one.closes_at = one.tokens[one.begin :], None
            if self._open in written and self._close not in written and count + len(self._closing) < one.request.sampling.max_new_tokens:
                one.write(self._closing)

    def _answer(self, one: Sequence) -> None:
        guide = self._guide(one.request)
        one.walk = Walk(guide, one.request.exact)
        one.write(guide.head + one.walk.forced())

    def _guide(self, request: Request) -> Guide:
        if request.answer not in self._guides:
            self._guides[request.answer] = compile_guide(self.tokenizer.encode, request.answer)
        return self._guides[request.answer]

    def _check(self, request: Request, prefix: int, own: int, new: int) -> None:
        needs = f"the request {request.window!r} needs {prefix + own + new} tokens ({prefix + own} of prompt, {new} new)"
        if not own:
            raise UserError(f"the request {request.window!r} has an empty prompt")
        if prefix + own + new > self.positions:
            raise UserError(f"{needs}, and the model has {self.positions} positions: lower --max-new-tokens")
        if page_count(prefix, self.page_size) + page_count(own + new, self.page_size) > self.pages:
            raise UserError(f"{needs}, more than the cache holds: raise --cache-tokens (now {self.pages * self.page_size})")
