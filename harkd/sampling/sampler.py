"""From logits to a token: penalty, temperature, top-k, top-p, min-p, and a draw whose noise is a function of its address.

    p = softmax(logits / temperature)  cut to the top_k largest, then to the smallest set of mass top_p, then to p >= min_p * max p;  renormalised
    token = the first, in order of falling p, at which the cumulative p exceeds u,    u = uniform(key, position),  key = hash(seed, window, sample)

One uniform number per token suffices (inversion of the distribution function), and it depends on (seed, window, sample, position) alone: neither on the batch, nor on what
ran before, nor on the device. The order of the cuts is Hugging Face's. Recommended values: model cards of Qwen3.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harkd.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing; presence_penalty is subtracted from the logit of every token already written."""

    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95
    min_p: float = 0.0
    presence_penalty: float = 0.0
    max_new_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (  # comparisons with nan are false
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("presence penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a number"),
            ("max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
        )
        for name, value, holds, demand in checks:
            if not holds:
                raise UserError(f"{name} must be {demand}, not {value}")


def recommended(thinking: bool) -> Sampling:
    """Qwen3's recommended settings: 0.6 / 20 / 0.95 with reasoning (never greedy: it repeats without end), 0.7 / 20 / 0.8 without."""
    return Sampling() if thinking else Sampling(temperature=0.7, top_p=0.8, max_new_tokens=1024)


def noise_key(seed: int, window: str, sample: int) -> int:
    """The 64-bit key of one completion's noise."""
    digest = hashlib.blake2b(f"{seed}\0{window}\0{sample}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64 [B], of keys and positions, int64 [B]: the SplitMix64 sequence of each key at its position (Steele et al., OOPSLA 2014)."""

    def shifted(z: Tensor, bits: int) -> Tensor:  # logical shift to the right
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = keys + (positions + 1) * -0x61C8864680B583EB  # the golden ratio's 64 bits, as a signed number
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return shifted(z ^ shifted(z, 31), 11).double() * 2.0**-53


def sample(logits: Tensor, sampling: Sampling, u: Tensor, written: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args: logits [B, V] in float32; u [B] uniform in [0, 1), not used when greedy; written [B, V] bool, the tokens already written (for the presence penalty).
    Returns tokens [B] int64 and their logprobs [B]: log p under the model itself, before penalty, temperature and cuts.
    """
    log_normaliser = logits.logsumexp(-1)
    scores = logits if written is None else logits - sampling.presence_penalty * written
    tokens = scores.argmax(-1) if sampling.temperature == 0 else _draw(scores, sampling, u)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - log_normaliser


def _draw(scores: Tensor, sampling: Sampling, u: Tensor) -> Tensor:
    """Inversion sampling from the cut distribution of scores [B, V]."""
    count = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    scores, order = scores.topk(count, dim=-1)  # falling
    scores = scores.double()
    p = ((scores - scores[:, :1]) / sampling.temperature).softmax(-1)  # the difference first: the quotient may overflow
    before = p.cumsum(-1) - p  # mass of the more probable tokens
    p = p * ((before < sampling.top_p) & (p >= sampling.min_p * p[:, :1]))
    cumulative = p.cumsum(-1)
    index = (cumulative <= u[:, None].to(cumulative) * cumulative[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, index.clamp_max(count - 1))[:, 0]
