"""Whether probabilities mean what they say: of the events that were given a label with probability 0.8, are 80% right?

Events fall into BINS equal bins by the probability p of their predicted label, bin b holding (b / BINS, (b + 1) / BINS], and 0 the first:

    ECE = sum_b n_b / n |accuracy_b - mean p_b|

The reliability curve is (mean p_b, accuracy_b) over the bins that hold an event.

Source: C. Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    events: int
    probability: float  # mean of those given
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    events: int
    ece: float | None  # None over no events
    curve: tuple[Bin, ...]


def calibration(probabilities: Sequence[float], correct: Sequence[bool], bins: int = BINS) -> Calibration:
    """Of scored events: the probability that each one's predicted label was given, and whether that label is right.

    ValueError where a probability lies outside 0 to 1, or there is not one for each event.
    """
    p, right = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=bool)
    if p.shape != right.shape or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("each event needs a probability from 0 to 1, and whether its label is right")
    of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p)
    held = [of == b for b in range(bins) if (of == b).any()]
    curve = tuple(Bin(int(here.sum()), float(p[here].mean()), float(right[here].mean())) for here in held)
    ece = sum(b.events * abs(b.accuracy - b.probability) for b in curve) / len(p) if len(p) else None
    return Calibration(len(p), ece, curve)
