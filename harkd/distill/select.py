"""Which traces to learn from.

A trace can be learnt from if its answer names a label for every event, it was not cut off by length, and its text holds no control token,
which would end the turn in the middle. Of these, `keep` takes

    correct     every sample with agreement >= min_agreement; none where there is no truth to agree with
    consistent  every sample with consistency >= min_agreement, the truth left aside; none of a window that has one sample
                consistency = share of (event, other sample of its window) with the same label
    best        one sample of each window: the highest agreement (no truth counts as lowest), then the fewest completion tokens, then the
                lowest sample number; however low that agreement is, so that every window that can be learnt from is represented
    all         every one

A cap then thins out the common classes: traces are taken in an order drawn by their names, and one is left out when each of the labels that
it teaches is in `cap` others already. What is left out is counted by cause.

The paper's own rule is not public; `correct` with min_agreement 1 is the filter that a re-implementation of it describes. It keeps windows
that are easy as a whole: a teacher that is right about nine events in ten has all ten right in a third of them. So 0.8 is the default.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harkd.distill.traces import Trace
from harkd.errors import UserError
from harkd.homes.prompt import CONTROL

KEEP = ("correct", "consistent", "best", "all")
MIN_AGREEMENT = 0.8
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Selection:
    """The traces to learn from, in the order in which they were read, and how many were dropped for which cause.

    `by_class` has (kept, of how many) for each label: of a trace's truth, or of its answer where it has no truth.
    """

    kept: list[Trace]
    dropped: Mapping[str, int]
    by_class: Mapping[str, tuple[int, int]]

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


def select(traces: Iterable[Trace], keep: str = "correct", min_agreement: float = MIN_AGREEMENT, cap: int | None = None) -> Selection:
    """Choose the traces to learn from, as told at the top of this file. `min_agreement` matters to "correct" and "consistent" alone."""
    if keep not in KEEP:
        raise UserError(f"--keep is one of {', '.join(KEEP)}, not {keep!r}")
    dropped: Counter[str] = Counter()
    of: Counter[str] = Counter()
    windows: dict[str, list[Trace]] = defaultdict(list)  # what can be learnt from
    kept: list[Trace] = []
    for trace in traces:
        of.update(_classes(trace))
        cause = unusable(trace)
        if cause is None:
            kept.append(trace)
            windows[trace.window].append(trace)
        else:
            dropped[cause] += 1

    def narrow(cause: str, wanted: Iterable[Trace]) -> None:
        keys = {(trace.window, trace.sample) for trace in wanted}
        left = [trace for trace in kept if (trace.window, trace.sample) in keys]
        dropped.update({cause: len(kept) - len(left)} if len(left) < len(kept) else {})
        kept[:] = left

    if keep in ("correct", "consistent"):
        agreed = (lambda trace: trace.agreement) if keep == "correct" else lambda trace: consistency(trace, windows[trace.window])
        whom = "truth" if keep == "correct" else "another sample"
        narrow(f"without {whom} to agree with", [trace for trace in kept if agreed(trace) is not None])
        narrow(f"agreement below {min_agreement}", [trace for trace in kept if agreed(trace) >= min_agreement])
    if keep == "best":
        narrow("not the best of their window", [min(samples, key=_rank) for samples in windows.values()])
    if cap is not None:
        narrow(f"in classes with {cap} others", _capped(kept, cap))
    counts = Counter(label for trace in kept for label in _classes(trace))
    return Selection(kept, dict(dropped), {label: (counts[label], of[label]) for label in sorted(of)})


def consistency(trace: Trace, samples: Sequence[Trace]) -> float | None:
    """How far the samples of a window, `trace` among them, agree with it; None if there is no other."""
    pairs = len(trace.answer) * (len(samples) - 1)
    same = sum(label == other for sample in samples for label, other in zip(trace.answer, sample.answer, strict=True)) - len(trace.answer)
    return same / pairs if pairs else None


def _capped(traces: Sequence[Trace], cap: int) -> list[Trace]:
    taught: Counter[str] = Counter()
    kept = []
    for trace in sorted(traces, key=lambda trace: hashlib.sha256(f"{trace.window} {trace.sample}".encode()).digest()):
        if any(taught[label] < cap for label in trace.answer):
            kept.append(trace)
            taught.update(set(trace.answer))
    return kept


def _classes(trace: Trace) -> set[str]:
    return {label for true in trace.truth for label in true} or {label for label in trace.answer if label is not None}


def _rank(trace: Trace) -> tuple[float, int, int]:
    """Lower is better."""
    return 1.0 if trace.agreement is None else -trace.agreement, trace.tokens["completion"], trace.sample


def yield_table(traces: Sequence[Trace], thresholds: Sequence[float] = THRESHOLDS) -> str:
    """How many traces keep="correct" would keep at each agreement threshold, in all and by class, the commonest first: for a terminal."""
    found = [select(traces, "correct", threshold) for threshold in thresholds]
    rows = [(label, [one.by_class[label][0] for one in found]) for label in found[0].by_class]
    rows.sort(key=lambda row: ([-count for count in row[1]], row[0]))
    width = max(map(len, ("agreement at least", *found[0].by_class)))
    lines = ["agreement at least".ljust(width) + "".join(f"{threshold:7.1f}" for threshold in thresholds)]
    rows.append(("traces", [len(one.kept) for one in found]))
    return "\n".join([*lines, *(label.ljust(width) + "".join(f"{count:7d}" for count in counts) for label, counts in rows)])
