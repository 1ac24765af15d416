"""How well predictions name the activities of events.

By its true labels among those on offer an event is unscored (none), scored (exactly one) or shared by residents who act at once (several).
Over the scored events, with C[t, p] the number of events of true label t that were predicted p, and one more column for no valid answer
(none at all, or a label that is not on offer):

    support[t]   = sum_p C[t, p]                  predictions never change it
    precision[t] = C[t, t] / sum_t' C[t', t]      0 if t was never predicted
    recall[t]    = C[t, t] / support[t]           0 without support; no answer is a false negative
    F1[t]        = 2 C[t, t] / (support[t] + sum_t' C[t', t])
    accuracy     = sum_t C[t, t] / scored events  (accuracy_of_all: / all events, so that what was left unscored shows)
    weighted F1  = sum_t support[t] F1[t] / scored events
    macro F1     = mean of F1[t] over the labels with support

These are scikit-learn's definitions with zero_division=0. Events with several labels have figures of their own: any_of_accuracy, the share
whose prediction is among the true labels, to be read beside best_constant, what always answering best_constant_label would have got.
A figure over no events is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Truth = Sequence[str] | str | None
FIGURES = ("weighted_f1", "macro_f1", "accuracy")


@dataclass(frozen=True)
class LabelScores:
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class SeveralScores:
    """Over events with several true labels."""

    events: int
    any_of_accuracy: float | None
    best_constant: float | None
    best_constant_label: str | None  # the first on offer, of those that do equally well


@dataclass(frozen=True)
class Scores:
    labels: tuple[str, ...]  # on offer
    events: int  # all of them
    scored: int  # with exactly one true label
    correct: int  # of the scored
    missing: int  # scored events without a valid answer
    accuracy: float | None
    accuracy_of_all: float | None
    weighted_f1: float | None
    macro_f1: float | None
    per_label: dict[str, LabelScores]
    confusion: tuple[tuple[int, ...], ...]  # [labels, labels + 1]: true, predicted; the last column is no valid answer
    several: SeveralScores

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts for JSON; the confusion's column of no valid answer is called null."""
        confusion = {"rows": list(self.labels), "columns": [*self.labels, None], "counts": [list(row) for row in self.confusion]}
        return {**asdict(self), "labels": list(self.labels), "confusion": confusion}


def score(truth: Sequence[Truth], predictions: Sequence[str | None], labels: Sequence[str] | None = None) -> Scores:
    """Compare each event's true labels (a tuple; a str is one label, () or None is unscored) with its prediction (None: no valid answer).

    `labels` are those on offer, in the order of the report; true labels outside them do not count. By default they are all that occur,
    sorted. ValueError if there is not one prediction for each event.
    """
    if len(truth) != len(predictions):
        raise ValueError(f"{len(truth)} events, but {len(predictions)} predictions")
    true = [_as_tuple(event) for event in truth]
    if labels is None:
        labels = sorted({label for event in true for label in event} | {label for label in predictions if label is not None})
    labels = tuple(dict.fromkeys(labels))
    pairs = [(tuple(label for label in labels if label in event), prediction) for event, prediction in zip(true, predictions)]

    confusion = _confusion([(event[0], prediction) for event, prediction in pairs if len(event) == 1], labels)
    hits, support, predicted, f1 = counts_and_f1(confusion)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    scored, correct = int(support.sum()), int(hits.sum())
    overall = dict(zip(FIGURES, summary(confusion).tolist() if scored else (None,) * len(FIGURES)))
    per_label = zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    return Scores(
        labels=labels, events=len(pairs), scored=scored, correct=correct, missing=int(confusion[:, -1].sum()),
        accuracy_of_all=correct / len(pairs) if pairs else None, **overall,
        per_label={label: LabelScores(*figures) for label, figures in zip(labels, per_label)},
        confusion=tuple(map(tuple, confusion.tolist())),
        several=_several([(event, prediction) for event, prediction in pairs if len(event) > 1], labels),
    )  # fmt: skip


def counts_and_f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hits, support, number of predictions and F1 of each label, all [..., L], from confusions [..., L, L + 1]."""
    hits, support = confusion.diagonal(axis1=-2, axis2=-1), confusion.sum(axis=-1)
    predicted = confusion[..., :-1].sum(axis=-2)
    return hits, support, predicted, 2 * hits / np.maximum(support + predicted, 1)


def summary(confusion: np.ndarray) -> np.ndarray:
    """The FIGURES [..., 3] of confusions [..., L, L + 1] with at least one event each."""
    hits, support, _, f1 = counts_and_f1(confusion)
    events = support.sum(axis=-1)
    weighted, macro = (support * f1).sum(axis=-1) / events, f1.sum(axis=-1) / (support > 0).sum(axis=-1)
    return np.stack([weighted, macro, hits.sum(axis=-1) / events], axis=-1)


def _as_tuple(event: Truth) -> tuple[str, ...]:
    return (event,) if isinstance(event, str) else tuple(event or ())


def _confusion(pairs: Sequence[tuple[str, str | None]], labels: tuple[str, ...]) -> np.ndarray:
    index = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for true, prediction in pairs:
        counts[index[true], index.get(prediction, len(labels))] += 1
    return counts


def _several(pairs: Sequence[tuple[tuple[str, ...], str | None]], labels: tuple[str, ...]) -> SeveralScores:
    if not pairs:
        return SeveralScores(0, None, None, None)
    frequency = Counter(label for event, _ in pairs for label in event)
    best = max(labels, key=lambda label: frequency[label])
    any_of = sum(prediction in event for event, prediction in pairs) / len(pairs)
    return SeveralScores(len(pairs), any_of, frequency[best] / len(pairs), best)
