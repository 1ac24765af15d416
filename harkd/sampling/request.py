"""What is asked of a generator: how to draw tokens, and one completion to write. Plain data, without torch.

Recommended values: model cards of Qwen3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harkd.errors import UserError

BATCH = 64  # completions written at once, where nothing else is said


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing; presence_penalty is subtracted from the logit of every token already
    written; a completion that still reasons when it has max_thinking tokens is made to close its thought and to answer.
    """

    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95
    min_p: float = 0.0
    presence_penalty: float = 0.0
    max_new_tokens: int = 4096
    seed: int = 0
    max_thinking: int | None = None

    def __post_init__(self) -> None:
        checks = (  # comparisons with nan are false
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("presence penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a number"),
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("max-thinking", self.max_thinking, self.max_thinking is None or self.max_thinking >= 0, "0 or more"),
        )
        for name, value, holds, demand in checks:
            if not holds:
                raise UserError(f"{name} must be {demand}, not {value}")


def recommended(thinking: bool) -> Sampling:
    """Qwen3's recommended settings: 0.6 / 20 / 0.95 with reasoning (never greedy: it repeats without end), 0.7 / 20 / 0.8 without."""
    return Sampling() if thinking else Sampling(temperature=0.7, top_p=0.8, max_new_tokens=1024)


@dataclass(frozen=True)
class Request:
    """One completion to write: rendered text (see Tokenizer.chat), of which requests may share the beginning."""

    window: str  # names the request; with `sample` and the seed it decides the noise
    prompt: str  # what follows the prefix
    prefix: str = ""  # what may be shared; it must end at a special token
    sample: int = 0
    sampling: Sampling = Sampling()
    answer: tuple[str | tuple[str, ...], ...] = ()  # a guided answer's known texts and choices, see guide.py; () leaves the text free
    thinking: bool = False  # reason before the guided answer
    exact: bool = False  # compute the probabilities of all options, not only along the way taken
