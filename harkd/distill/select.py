"""Which traces to learn from.

A trace can be learnt from if its answer names a label for every event, it was not cut off by length, and its text holds no control token,
which would end the turn in the middle. Of these, `keep` takes

    correct   every sample with agreement >= min_agreement; none where there is no truth to agree with
    best      one sample of each window: the highest agreement (no truth counts as lowest), then the fewest completion tokens, then the
              lowest sample number; however low that agreement is, so that every window that can be learnt from is represented
    all       every one

What is left out is counted by cause. The paper's own rule is not public; `correct` with min_agreement 1 is the filter that a
re-implementation of it describes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harkd.distill.traces import Trace
from harkd.errors import UserError
from harkd.homes.prompt import CONTROL

KEEP = ("correct", "best", "all")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Selection:
    """The traces to learn from, in the order in which they were read, and how many were dropped for which cause."""

    kept: list[Trace]
    dropped: Mapping[str, int]

    @property
    def summary(self) -> str:
        """One line for people: "kept 12 of 40 traces (dropped: 25 agreement below 1.0, 3 cut off by length)"."""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.dropped.items())
        total = len(self.kept) + sum(self.dropped.values())
        return f"kept {len(self.kept)} of {total} traces" + (f" (dropped: {causes})" if causes else "")


def unusable(trace: Trace) -> str | None:
    """Why nothing can be learnt from a trace, None if something can."""
    if trace.finish_reason == "length":
        return "cut off by length"
    if not trace.answer or None in trace.answer:
        return "without a label for every event"
    written = trace.messages[-1]
    found = CONTROL.search(f"{written.get('reasoning_content') or ''}\n{written['content']}")
    return "with a control token in its text" if found else None


def select(traces: Iterable[Trace], keep: str = "correct", min_agreement: float = 1.0) -> Selection:
    """Choose the traces to learn from, as told at the top of this file. `min_agreement` matters to keep="correct" alone."""
    if keep not in KEEP:
        raise UserError(f"--keep is one of {', '.join(KEEP)}, not {keep!r}")
    dropped: Counter[str] = Counter()
    kept: list[Trace] = []
    for trace in traces:
        cause = unusable(trace)
        if cause is None and keep == "correct":
            cause = _disagreement(trace, min_agreement)
        if cause is None:
            kept.append(trace)
        else:
            dropped[cause] += 1
    if keep == "best":
        best: dict[str, Trace] = {}
        for trace in kept:
            if trace.window not in best or _rank(trace) < _rank(best[trace.window]):
                best[trace.window] = trace
        if len(best) < len(kept):
            dropped["not the best of their window"] = len(kept) - len(best)
        kept = list(best.values())
    return Selection(kept, dict(dropped))


def _disagreement(trace: Trace, min_agreement: float) -> str | None:
    if trace.agreement is None:
        return "without truth to agree with"
    return f"agreement below {min_agreement}" if trace.agreement < min_agreement else None


def _rank(trace: Trace) -> tuple[float, int, int]:
    """Lower is better."""
    return 1.0 if trace.agreement is None else -trace.agreement, trace.tokens["completion"], trace.sample


@dataclass(frozen=True)
class YieldTable:
    """How many traces with a complete answer each agreement threshold keeps.

    `total[i]` are those with agreement >= thresholds[i]; `by_class[label][i]` those of them with at least one scored event of that true
    label, so that a trace counts once under each of its labels.
    """

    thresholds: tuple[float, ...]
    total: tuple[int, ...]
    by_class: Mapping[str, tuple[int, ...]]

    def text(self) -> str:
        """The table for a terminal, classes by how often they occur at the lowest threshold."""
        rows = sorted(self.by_class.items(), key=lambda row: (tuple(-count for count in row[1]), row[0]))
        width = max(map(len, ("agreement at least", *self.by_class)))
        lines = ["agreement at least".ljust(width) + "".join(f"{threshold:7.1f}" for threshold in self.thresholds)]
        lines += [label.ljust(width) + "".join(f"{count:7d}" for count in counts) for label, counts in (*rows, ("traces", self.total))]
        return "\n".join(lines)


def yield_table(traces: Iterable[Trace], thresholds: Sequence[float] = THRESHOLDS) -> YieldTable:
    """Count what each threshold of keep="correct" would keep, in all and by class. Every true label has a row, of zeros if need be."""
    total = Counter[float]()
    by_class: dict[str, Counter[float]] = {}
    for trace in traces:
        classes = {label for true in trace.truth for label in true}
        for label in classes:
            by_class.setdefault(label, Counter())
        if unusable(trace) or trace.agreement is None:
            continue
        for threshold in (t for t in thresholds if trace.agreement >= t):
            total[threshold] += 1
            for label in classes:
                by_class[label][threshold] += 1
    rows = {label: tuple(count[t] for t in thresholds) for label, count in sorted(by_class.items())}
    return YieldTable(tuple(thresholds), tuple(total[t] for t in thresholds), rows)
