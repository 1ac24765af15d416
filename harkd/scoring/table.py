"""Results as plain text for a terminal: aligned columns, models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {  # key of a model's row -> heading
    "name": "model",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "malformed": "malformed",
    "missing": "missing",
    "parameters": "parameters",
    "seconds_per_window": "s/window",
}
LONGEST = 24  # characters of a label before it is shortened


def align(rows: Sequence[Sequence[str]]) -> str:
    """Lines of equal columns two blanks apart, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def comparison(models: Sequence[Mapping[str, Any]]) -> str:
    """A row for each model, with the keys of COLUMNS, and its weighted F1 against the first's: gap (own - first) and ratio (own / first).

    A figure's 95% interval follows it where the row has one, as `<key>_interval`: [low, high]. What is absent or None, or a ratio to zero,
    is shown as "-".
    """
    rows = [[*COLUMNS.values(), "gap", "ratio"]]
    for model in models:
        own, first = model.get("weighted_f1"), models[0].get("weighted_f1")
        known = own is not None and first is not None
        gap = f"{own - first:+.3f}" if known else "-"
        ratio = f"{own / first:.3f}" if known and first else "-"
        cells = (_cell(key, model.get(key)) + _interval(model.get(f"{key}_interval")) for key in COLUMNS)
        rows.append([*cells, gap, ratio])
    return align(rows)


def tables(models: Sequence[Mapping[str, Any]]) -> str:
    """A comparison of the models for each data set, the `data` of a row, and the weighted F1 of all where there are several."""
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for model in models:
        sets.setdefault(model["data"], []).append(model)
    if len(sets) == 1:
        return comparison(models)
    return "\n\n".join([*(f"{name}\n{comparison(rows)}" for name, rows in sets.items()), f"weighted F1\n{overview(sets)}"])


def overview(sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The weighted F1 on each data set, down, of each model, across, and the mean over those where it is known."""
    table = [["data", *(model["name"] for model in next(iter(sets.values())))]]
    for data, models in sets.items():
        table.append([data, *(_cell("", model["weighted_f1"]) + _interval(model.get("weighted_f1_interval")) for model in models)])
    of_model = ([m["weighted_f1"] for m in models if m["weighted_f1"] is not None] for models in zip(*sets.values(), strict=True))
    return align([*table, ["mean", *(_cell("", sum(known) / len(known) if known else None) for known in of_model)]])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "seconds_per_window":
        return f"{value:.3g}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _interval(limits: Sequence[float] | None) -> str:
    return f" [{limits[0]:.3f}, {limits[1]:.3f}]" if limits else ""


def shorten(label: str) -> str:
    """Leave out the middle of a long label: names differ at either end ("preparing breakfast", "preparing dinner")."""
    if len(label) <= LONGEST:
        return label
    head = LONGEST // 2
    return f"{label[:head]}…{label[head + 1 - LONGEST :]}"
