"""From logits to a token: penalty, temperature, top-k, top-p, min-p, and a draw whose noise is a function of its address.

    p = softmax(logits / temperature)  cut to the top_k largest, then to the smallest set of mass top_p, then to p >= min_p * max p;
                                       renormalised
    token = the first, in order of falling p, at which the cumulative p exceeds u
    u = uniform(key, position),  key = hash(seed, window, sample)

One uniform number per token suffices (inversion of the distribution function), and it depends on (seed, window, sample, position) alone:
neither on the batch, nor on what ran before, nor on the device. The order of the cuts is Hugging Face's.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from harkd.sampling.request import Sampling


def noise_key(seed: int, window: str, sample: int) -> int:
    """The 64-bit key of one completion's noise."""
    digest = hashlib.blake2b(f"{seed}\0{window}\0{sample}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64 [B], of keys and positions, int64 [B].

    It is the SplitMix64 sequence of each key at its position (Steele et al., OOPSLA 2014).
    """

    def shifted(z: Tensor, bits: int) -> Tensor:  # logical shift to the right
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = keys + (positions + 1) * -0x61C8864680B583EB  # the golden ratio's 64 bits, as a signed number
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return shifted(z ^ shifted(z, 31), 11).double() * 2.0**-53


def sample(logits: Tensor, sampling: Sampling, u: Tensor, written: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args: logits [B, V] in float32; u [B] uniform in [0, 1), not used when greedy; written [B, V] bool, the tokens already written (for the
    presence penalty).
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
