"""95% intervals of weighted F1, macro F1 and accuracy, and of the difference between two models, from a bootstrap over groups.

Events of a group resemble each other, so groups are drawn, not events: of G groups G with replacement, DRAWS times. With C[g] the confusion
of group g and n[b, g] how often draw b holds it, the figures of draw b are those of

    sum_g n[b, g] C[g]                                                  [DRAWS, L, L + 1], one matrix product

and the interval goes from their 2.5th to their 97.5th percentile. Two models are compared on the same draws, which leaves out what is hard
for both. Fewer than LEAST groups say too little of other groups: no interval. Groups without a scored event do not count.

Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6, 8 and 13.
"""

from __future__ import annotations

import numpy as np

from harkd.scoring.metrics import FIGURES, summary

DRAWS, LEAST = 2000, 8


def intervals(confusions: np.ndarray, seed: int = 0) -> dict[str, list[float]] | None:
    """[low, high] of each figure for the confusions of groups, [G, L, L + 1]; None where there are too few groups."""
    draws = _draws(confusions, seed)
    return None if draws is None else {name: _percentiles(values) for name, values in zip(FIGURES, _redrawn(confusions, draws).T)}


def paired_differences(own: np.ndarray, other: np.ndarray, seed: int = 0) -> dict[str, dict[str, float | list[float] | None]] | None:
    """Own less other figures, and their interval (None where there are too few groups), for the same groups' confusions in the same order.

    None where no event is scored. ValueError where groups differ in their events.
    """
    if own.shape != other.shape or (own.sum(axis=-1) != other.sum(axis=-1)).any():
        raise ValueError("the two models were not scored on the same events")
    if not own.any():
        return None
    differences, draws = summary(own.sum(axis=0)) - summary(other.sum(axis=0)), _draws(own, seed)
    spread = None if draws is None else (_redrawn(own, draws) - _redrawn(other, draws)).T
    found = [None] * len(FIGURES) if spread is None else map(_percentiles, spread)
    return {name: {"difference": float(value), "interval": each} for name, value, each in zip(FIGURES, differences, found)}


def _draws(confusions: np.ndarray, seed: int) -> np.ndarray | None:
    """How often each draw holds each group, [DRAWS, G], or None."""
    filled = confusions.any(axis=(1, 2))
    if filled.sum() < LEAST:
        return None
    draws = np.zeros((DRAWS, len(filled)))
    draws[:, filled] = np.random.default_rng(seed).multinomial(filled.sum(), np.full(filled.sum(), 1 / filled.sum()), size=DRAWS)
    return draws


def _redrawn(confusions: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The figures of each draw, [DRAWS, 3]. Sums of whole numbers are exact in float64, in whatever order they are added."""
    return summary((draws @ confusions.reshape(len(confusions), -1)).reshape(len(draws), *confusions.shape[1:]))


def _percentiles(values: np.ndarray) -> list[float]:
    return np.percentile(values, [2.5, 97.5]).tolist()
