"""An evaluation told in Markdown and pictures: tables with intervals, confusions, calibration, F1 against size and cost, one recording as
people lived it, the windows that went worst with what was written, and all that is needed to run it again.

    report.md   report-*.png   timeline.png        beside metrics.json, from which, with the predictions, they are made
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from harkd.files import read_json, write_text
from harkd.homes.events import Window
from harkd.scoring import plots
from harkd.scoring.baselines import joined, recordings
from harkd.scoring.predictions import Record, read_records
from harkd.scoring.table import align, tables

WORST, LONGEST = 3, 2000  # windows shown for each model, characters of a completion
ENOUGH = 150  # scored events that a recording needs to be as good for a picture as a longer one


class Seen(NamedTuple):
    """What one pass over a data set's windows keeps: those that were asked for, a digest of all, one recording with a life of its own."""

    wanted: dict[str, Window]
    digest: str
    recording: list[Window]


def write_timeline(
    path: Path, run: Sequence[Window], answers: Mapping[str, Sequence[str | None]], labels: Sequence[str], name: str
) -> None:
    """Draw the windows of one recording with what `name` answered to them, by their ids."""
    events, predicted = joined(run).events, [label for window in run for label in answers[window.id]]
    plots.timeline(path, events, predicted, labels, f"{run[0].home}, {run[0].recording}: {name}")


def look(windows: Iterable[Window], wanted: Iterable[str] = ()) -> Seen:
    """Pass over the windows once. The recording that is kept has the most residents and, of those, the most scored events up to ENOUGH."""
    ids, found, digest, best, kept = frozenset(wanted), {}, hashlib.sha256(), (-1, -1), []
    for run in recordings(windows):
        for window in run:
            told = [window.id, *((str(event.time), event.description, event.labels) for event in window.events)]
            digest.update(json.dumps(told).encode())
            found |= {window.id: window} if window.id in ids else {}
        events = joined(run).events
        rank = len({event.resident for event in events}), min(ENOUGH, sum(bool(event.labels) for event in events))
        if rank > best:
            best, kept = rank, run
    return Seen(found, digest.hexdigest()[:16], kept)


def write_report(
    folder: Path, predictions: Mapping[str, Path], windows: Mapping[str, Iterable[Window]], result: Mapping[str, Any], command: str
) -> None:
    """Write report.md and its pictures into a run's folder. `predictions` has a file for each model by name, `windows` those of each data
    set by name, `result` is the run's. Raises UserError without matplotlib.
    """
    plots.need()
    metrics, settings = read_json(folder / "metrics.json"), read_json(folder / "settings.json")
    text, digests = ["# Evaluation", _block(tables(result["models"])), _block(_normalised(metrics["models"]))], {}
    answers, worst = {}, {}  # by data set and model
    for name, path in predictions.items():
        for data, records in read_records(path).items():
            answers[data, name] = {record["window"]: record["answer"] for record in records}
            worst[data, name] = _worst(record for record in records if "text" in record)
    for number, (data, of_data) in enumerate(windows.items(), 1):
        scores = [row for row in metrics["models"] if row["data"] == data]
        rows = [row for row in result["models"] if row["data"] == data]
        seen = look(of_data, (record["window"] for name in predictions for record in worst[data, name]))
        digests[data] = seen.digest
        interval = "95% intervals are from a bootstrap over these" if scores[0]["intervals"] else "too few for intervals"
        text += [f"## {data}", f"{counts(scores[0], metrics['split'])}, in {scores[0]['groups']} groups: {interval}."]
        text += _pictures(folder, number, scores, rows)
        best = max(rows, key=lambda row: row["weighted_f1"] or 0)["name"]
        write_timeline(folder / f"report-timeline-{number}.png", seen.recording, answers[data, best], scores[0]["labels"], best)
        text += ["### One recording", f"![timeline](report-timeline-{number}.png)"]
        for name in predictions:
            shown = [_window(seen.wanted[record["window"]], record) for record in worst[data, name]]
            text += [f"### Worst windows: {name}", *shown] if shown else []
    text += ["## Provenance", _block(_provenance(settings, digests, folder, command))]
    write_text(folder / "report.md", "\n\n".join(text) + "\n")


def _block(text: str) -> str:
    """Text shown as it stands, between fences longer than any in it."""
    fence = "`" * (3 + text.count("`"))
    return f"{fence}\n{text}\n{fence}"


def _normalised(models: Sequence[Mapping[str, Any]]) -> str:
    """What the first table leaves out: the lenient figure, calibration, and the difference from the first with its interval."""
    rows = [["model", "data", "weighted F1", "labels normalised", "ECE", "against the first"]]
    for model in models:
        strict, lenient = model["weighted_f1"], model["normalised"]["weighted_f1"]
        against = (model["against_first"] or {}).get("weighted_f1")
        limits = against and against["interval"]
        gap = f"{against['difference']:+.3f}" + (f" [{limits[0]:+.3f}, {limits[1]:+.3f}]" if limits else "") if against else "-"
        found = [f"{value:.3f}" if value is not None else "-" for value in (strict, lenient, (model["calibration"] or {}).get("ece"))]
        rows.append([model["name"], model["data"], *found, gap])
    return align(rows)


def counts(scores: Mapping[str, Any], split: str) -> str:
    """What was scored."""
    return f"{scores['windows']} windows of {split}, {scores['events']} events, of which {scores['scored']} are scored"


def _pictures(folder: Path, number: int, scores: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw what the figures of one data set give. Returns their Markdown."""
    text = []
    for place, row in enumerate(scores if scores[0]["scored"] else (), 1):
        name = f"report-confusion-{number}-{place}.png"
        plots.confusion(folder / name, row, row["name"])
        text.append(f"![confusion of {row['name']}]({name})")
    calibrated = {row["name"]: row["calibration"] for row in scores if row["calibration"]}
    if calibrated:
        plots.reliability(folder / f"report-calibration-{number}.png", calibrated)
        text.append(f"![calibration](report-calibration-{number}.png)")
    scored = [row for row in rows if row["weighted_f1"] is not None]
    if any(row["parameters"] for row in scored):
        plots.size_curve(folder / f"report-size-{number}.png", scored)
        text.append(f"![F1 against parameters and seconds](report-size-{number}.png)")
    return text


def _wrong(record: Record) -> list[bool]:
    return [bool(truth) and said not in truth for truth, said in zip(record["truth"], record["answer"], strict=True)]


def _worst(records: Iterable[Record]) -> list[Record]:
    """The windows with the most wrong events."""
    ranked = sorted(records, key=lambda record: (-sum(_wrong(record)), record["window"]))
    return [record for record in ranked if any(_wrong(record))][:WORST]


def _window(window: Window, record: Record) -> str:
    """A window's events with truth and answer, and what the model wrote."""
    rows = [["event", "truth", "answer", ""]]
    for event, said, wrong in zip(window.events, record["answer"], _wrong(record), strict=True):
        shown = f"{event.time:%H:%M:%S} {event.description}"
        rows.append([shown, " or ".join(event.labels) or "-", said or "none", "wrong" if wrong else ""])
    written = record["text"] if len(record["text"]) <= LONGEST else f"{record['text'][:LONGEST]} ..."
    return f"{window.id}, finished by {record['finish_reason']}:\n\n{_block(align(rows))}\n\n{_block(written)}"


def _provenance(settings: Mapping[str, Any], digests: Mapping[str, str], folder: Path, command: str) -> str:
    """What was run, on what, with which versions."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("harkd", "torch", "numpy", "tokenizers", "matplotlib"):
        versions[name] = getattr(sys.modules.get(name), "__version__", None) or metadata.version(name)
    scores = hashlib.sha256((folder / "metrics.json").read_bytes()).hexdigest()[:16]
    told = {"command": command, "versions": versions, "windows": digests, "metrics.json": scores, "settings": settings}
    return json.dumps(told, indent=2, ensure_ascii=False)
