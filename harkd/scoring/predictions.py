"""The scores and costs in a file of predictions: one record for each window, as `python -m harkd.eval` writes them.

Beside the strict scores stand, apart, those of the answers read again with normalised labels, and, where records hold the `probabilities`
of a guided answer ({label: p} of each event), how well these are calibrated.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from harkd.homes.answer import Answer
from harkd.jsonl import read_json_lines
from harkd.scoring.calibration import calibration
from harkd.scoring.intervals import intervals
from harkd.scoring.metrics import FIGURES, score

Record = Mapping[str, Any]
Reader = Callable[[Record], Sequence[str | None]]  # the label of each event


def read_records(path: Path) -> dict[str, list[Record]]:
    """The records of a file by the name of their data set, none for a name that is not there."""
    found: dict[str, list[Record]] = defaultdict(list)
    for _, record in read_json_lines(path):
        found[record["data"]].append(record)
    return found


def score_records(
    records: Iterable[Record], labels: Sequence[str], lost: Iterable[tuple[str, Sequence[str]]], reread: Reader
) -> tuple[dict[str, Any], np.ndarray]:
    """All scores of at least one record, and the confusion of each group, [G, L, L + 1], for comparisons.

    `lost` holds group and true labels of events in no window, which count as missing; `reread` gives a record's answer with its labels
    normalised.
    """
    strict, lenient, causes, said = defaultdict(list), [], Counter[str](), []
    windows = malformed = 0
    for record in records:
        windows += 1
        strict[record["group"]] += zip(record["truth"], record["answer"], strict=True)
        lenient += zip(record["truth"], reread(record), strict=True)
        causes.update(record["causes"])
        malformed += Answer(record["answer"], record["causes"]).malformed
        said += _said(record, labels)
    for group, truth in lost:
        strict[group].append((truth, None))
        lenient.append((truth, None))
        causes["dropped"] += 1
    pairs = [strict[group] for group in sorted(strict)]
    confusions = np.array([score(*zip(*group), labels).confusion for group in pairs])
    normalised = score(*zip(*lenient), labels)
    return {
        "windows": windows, "malformed": malformed / windows, "malformed_windows": malformed, "causes": dict(sorted(causes.items())),
        "groups": len(pairs), **score(*zip(*chain(*pairs)), labels).to_dict(),
        "normalised": {name: getattr(normalised, name) for name in (*FIGURES, "missing")},
        "calibration": asdict(calibration(*zip(*sorted(said)))) if said else None, "intervals": intervals(confusions),  # in one order
    }, confusions  # fmt: skip


def _said(record: Record, labels: Sequence[str]) -> list[tuple[float, bool]]:
    """Of each scored event with an answer and its probabilities: that of the answer, and whether it is right."""
    triples = zip(record["truth"], record["answer"], record.get("probabilities") or ())
    scored = (([label for label in truth if label in labels], answer, of) for truth, answer, of in triples if answer in of)
    return [(min(of[answer], 1.0), [answer] == true) for true, answer, of in scored if len(true) == 1]  # rounding may exceed 1


def costs(records: Iterable[Record]) -> dict[str, Any]:
    """What at least one prediction took, those of a run that was killed too, in all and per window."""
    told = ((record["seconds"], record.get("tokens", {})) for record in records)  # a baseline has no tokens
    spent = [(seconds, tokens.get("prompt", 0), tokens.get("completion", 0)) for seconds, tokens in told]
    sums = dict(zip(("seconds", "prompt_tokens", "completion_tokens"), map(sum, zip(*spent))))
    return {"windows": len(spent), **sums, **{f"{name}_per_window": value / len(spent) for name, value in sums.items()}}
