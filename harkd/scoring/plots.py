"""Pictures of results, as PNG files, drawn with matplotlib (the `plot` extra): nothing else of harkd needs it.

`timeline` shows a recording as people lived it: two lanes for each resident, the truth and what was predicted, a cell for each event in the
order of time (not to scale, since hours without events would leave no room for the others), a colour for each activity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harkd.errors import UserError
from harkd.files import replacing
from harkd.homes.events import Event
from harkd.scoring.table import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, Sequence[float] | None]]  # a figure at each place of the horizontal axis, and its interval
UNSCORED, INK = "#e4e4e4", "#333333"
PER_ROW, ROWS = 80, 4  # events in a row of a timeline, and rows


def installed() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def need() -> None:
    """Raise UserError where pictures cannot be drawn."""
    if not installed():
        raise UserError('pictures need matplotlib, which is not installed: pip install "harkd[plot]"')


def timeline(path: Path, events: Sequence[Event], predicted: Sequence[str | None], labels: Sequence[str], title: str = "") -> None:
    """Draw the events of one recording, at least one, the first PER_ROW x ROWS of them.

    `predicted` has a label for each event, None for no answer; `labels` are those on offer. A cross marks what is wrong, an empty cell of a
    prediction an event without an answer, a grey cell of the truth an unscored one.
    """
    need()
    events, predicted, every = events[: PER_ROW * ROWS], predicted[: PER_ROW * ROWS], len(events)
    residents = sorted({event.resident for event in events}, key=lambda name: (not name, name))  # what nobody is known to have caused last
    used = {label for event in events for label in event.labels} | {*predicted}
    colour = dict(zip((label for label in labels if label in used), _colours()))
    wide, lanes = -(-len(events) // -(-len(events) // PER_ROW)), 2 * len(residents)  # rows of equal length
    starts = range(0, len(events), wide)
    figure = _figure(2.6 + 0.14 * max(wide, 48), len(starts) * (0.26 * lanes + 0.55) + 0.9 + 0.24 * -(-len(colour) // 4))
    for row, axes in enumerate(figure.subplots(len(starts), squeeze=False)[:, 0]):
        begin = starts[row]
        stretch = events[begin : begin + wide]
        for x, (event, said) in enumerate(zip(stretch, predicted[begin:])):
            y, true = 2 * residents.index(event.resident), [label for label in event.labels if label in colour]
            for part, label in enumerate(true or [None]):  # several at once share the cell
                height = 0.9 / max(1, len(true))
                axes.bar(x, height, 1, y - 0.45 + part * height, align="edge", color=colour.get(label, UNSCORED))
            axes.bar(x, 0.9, 1, y + 0.55, align="edge", color=colour.get(said, "none"), edgecolor=None if said else UNSCORED)
            for ink, width in (("white", 3), (INK, 1)) if true and said not in true else ():  # a white edge shows on dark colours
                axes.plot(x + 0.5, y + 1, "x", color=ink, markersize=4, markeredgewidth=width)
        names = [f"{resident or 'unknown'} {lane}" for resident in residents for lane in ("truth", "predicted")]
        axes.set_yticks(range(lanes), names, fontsize=8)
        axes.set_xticks(range(0, len(stretch), 8), [f"{event.time:%H:%M:%S}" for event in stretch[::8]], fontsize=8)
        axes.set(xlim=(0, wide), ylim=(lanes - 0.4, -0.6))
        for y in range(2, lanes, 2):
            axes.axhline(y - 0.5, color=INK, linewidth=0.6)
    cut = f" (the first {len(events)} of {every} events)" if every > len(events) else ""
    figure.axes[0].set_title(f"{title}{cut}", fontsize=10, loc="left")
    legend = "events in order of time, not to scale; ×: wrong; grey: not scored; empty: no answer"
    figure.axes[-1].set_xlabel(legend, fontsize=8, loc="left")
    patches = [figure.axes[0].bar(0, 0, color=shade, label=shorten(label)) for label, shade in colour.items()]
    _save(figure, path, 4, handles=patches)


def confusion(path: Path, scores: Mapping[str, Any], title: str = "") -> None:
    """Draw a confusion as metrics.json holds it: true labels down, predicted ones across, each row's shares as shades. Labels that neither
    occur nor are predicted are left out."""
    counts = np.array(scores["confusion"]["counts"]).reshape(len(scores["labels"]), -1)
    kept = [i for i in range(len(counts)) if counts[i].any() or counts[:, i].any()]
    counts = counts[np.ix_(kept, [*kept, counts.shape[1] - 1])]
    names = [shorten(scores["labels"][i]) for i in kept]
    side = 2.2 + 0.36 * max(4, len(kept))
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), count in np.ndenumerate(counts):
        if count:
            axes.text(x, y, count, ha="center", va="center", fontsize=7, color="white" if shares[y, x] > 0.6 else INK)
    axes.set_xticks(range(len(names) + 1), [*names, "no answer"], rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def reliability(path: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the calibration of models by name, as metrics.json holds it: how often an answer of each probability is right."""
    figure = _figure(5.6, 4.6 + 0.2 * len(models))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=UNSCORED, zorder=0)
    for (name, found), colour in zip(models.items(), _colours()):
        p, right, events = (np.array([bin[key] for bin in found["curve"]]) for key in ("probability", "accuracy", "events"))
        axes.plot(p, right, color=colour, linewidth=1, label=f"{name}, ECE {found['ece']:.3f}")
        axes.scatter(p, right, 12 + 120 * events / events.sum(), color=colour)
    axes.set(xlabel="probability of the answer (a dot's size tells its events)", ylabel="share that is right")
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
    _save(figure, path, 1)


def size_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the weighted F1 of the models of one data set against their parameters and their seconds per window; baselines are lines."""
    figure = _figure(9, 3.6 + 0.2 * -(-len(rows) // 2))
    from matplotlib.ticker import EngFormatter, LogLocator

    panels = zip(figure.subplots(1, 2, sharey=True), ("parameters", "seconds_per_window"), ("parameters", "seconds per window"))
    for axes, key, heading in panels:
        for row, colour in zip(rows, _colours()):
            value, limits = row["weighted_f1"], row["weighted_f1_interval"]
            name = row["name"] if key == "parameters" else None  # once in the legend
            if not row["parameters"]:
                axes.axhline(value, color=colour, linestyle="--", linewidth=1, label=name)
            else:
                spread = [[value - limits[0]], [limits[1] - value]] if limits else None
                axes.errorbar(row[key], value, spread, fmt="o", color=colour, capsize=3, label=name)
        axes.set(xscale="log", xlabel=heading, ylim=(0, 1))
        lowest, highest = axes.get_xlim()
        if highest < 5 * lowest:  # no two of 1, 2, 5, 10 need lie in between
            axes.set_xlim(lowest / 2.5, highest * 2.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 200 * lowest else (1,)))
        axes.xaxis.set_major_formatter(EngFormatter() if key == "parameters" else "{x:g}")
        axes.xaxis.set_minor_formatter("")
    figure.axes[0].set_ylabel("weighted F1")
    _save(figure, path, 2)


def curves(path: Path, lines: Mapping[str, Curve], places: Sequence[str], heading: str = "") -> None:
    """Draw a figure of several models, such as weighted F1, at `places` along the horizontal axis: levels of noise, or weeks."""
    figure = _figure(max(5.6, 1.6 + 0.9 * len(places)), 3.8 + 0.2 * len(lines))
    axes = figure.subplots()
    for (name, curve), colour in zip(lines.items(), _colours()):
        x, y = np.arange(len(curve)), np.array([value for value, _ in curve])
        axes.plot(x, y, "o-", color=colour, markersize=4, label=name)
        if all(limits for _, limits in curve):
            low, high = np.array([limits for _, limits in curve]).T
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    slanted = {"rotation": 30, "ha": "right"} if max(map(len, places)) > 9 else {}
    axes.set_xticks(range(len(places)), places, fontsize=8, **slanted)
    axes.set(ylabel="weighted F1", ylim=(0, 1))
    axes.set_title(heading, fontsize=10, loc="left")
    _save(figure, path, 1)


def _figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, drawn without a display and without pyplot's global state."""
    need()
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=120, layout="constrained")


def _colours() -> list[Any]:
    """39 colours, unlike neighbours first, and without the grey of what is not scored."""
    from matplotlib import colormaps

    maps = (("tab10", (*range(7), 8, 9)), ("tab20b", range(0, 20, 2)), ("tab20", range(1, 20, 2)), ("tab20b", range(1, 20, 2)))
    return [colormaps[name](i) for name, order in maps for i in order]


def _save(figure: Figure, path: Path, columns: int = 0, **legend: Any) -> None:
    """Write the figure, with a legend below it in so many columns."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=2)
    if columns:
        figure.legend(**legend, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png")
