"""Pictures: what is drawn is looked for in the pixels, and the same data give the same bytes."""

import os
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from harkd.errors import UserError
from harkd.homes.events import Event
from harkd.scoring import plots
from harkd.scoring.metrics import score
from tests.helpers import ROOT

pytest.importorskip("matplotlib")
LABELS = ("COOKING", "EATING", "SLEEPING")
START = datetime(2024, 5, 1, 7)


def events(*who_does: tuple[str, str | None]) -> list[Event]:
    return [Event(n, START + timedelta(minutes=n), "s", "r", "on", (label,) if label else (), who) for n, (who, label) in enumerate(who_does)]


def pixels(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def count(path, colour: str) -> int:
    """How many pixels have exactly this colour."""
    from matplotlib.colors import to_rgb

    return int((abs(pixels(path) - [round(255 * part) for part in to_rgb(colour)]).max(axis=-1) == 0).sum())


def drawn(tmp_path, made, predicted, name="t.png"):
    plots.timeline(tmp_path / name, made, predicted, LABELS, "home, day")
    return tmp_path / name


DAY = events(*[("R1", "COOKING")] * 10, *[("R2", "EATING")] * 10, ("", None))
RIGHT = ["COOKING"] * 10 + ["EATING"] * 10 + ["EATING"]


def test_a_timeline_shows_truth_and_prediction_of_each_resident(tmp_path):
    right, wrong = drawn(tmp_path, DAY, RIGHT), drawn(tmp_path, DAY, ["EATING"] * 21, "wrong.png")
    blue, orange = "tab:blue", "tab:orange"  # of COOKING and EATING, the first labels that occur
    assert count(right, blue) > 1000 and count(right, orange) > 1000 and count(right, "tab:green") == 0
    assert 0.3 < count(wrong, blue) / count(right, blue) < 0.7  # the truth is still there
    assert count(wrong, orange) > 1.3 * count(right, orange)
    none = drawn(tmp_path, DAY, [None] * 21, "none.png")
    assert 0.3 < count(none, blue) / count(right, blue) < 0.7 and 0.3 < count(none, orange) / count(right, orange) < 0.6
    assert count(right, plots.UNSCORED) > 100  # what nobody wrote down


def test_a_cross_shows_on_dark_colours_too(tmp_path):
    """Its white edge lies on the cell of an answer."""
    right, wrong = drawn(tmp_path, DAY, RIGHT), drawn(tmp_path, DAY, RIGHT[::-1], "wrong.png")
    assert count(wrong, "white") > count(right, "white") + 50 and pixels(wrong).shape == pixels(right).shape


def test_an_event_with_several_labels_shows_them_all(tmp_path):
    both = [Event(0, START, "s", "r", "on", ("COOKING", "SLEEPING"), "1, 2")]
    shown = drawn(tmp_path, both, ["SLEEPING"])
    assert count(shown, "tab:blue") > 100 and count(shown, "tab:orange") > 2 * count(shown, "tab:blue")


def test_long_recordings_are_cut_and_rows_are_equal(tmp_path):
    long = events(*[("R1", "COOKING")] * 400)
    first = drawn(tmp_path, long, ["COOKING"] * 400)
    same = drawn(tmp_path, long[:320], ["COOKING"] * 320, "same.png")
    assert pixels(first).shape == pixels(same).shape and pixels(drawn(tmp_path, long[:90], ["COOKING"] * 90, "two.png")).shape < pixels(first).shape


def test_the_same_data_give_the_same_bytes(tmp_path):
    assert drawn(tmp_path, DAY, RIGHT).read_bytes() == drawn(tmp_path, DAY, RIGHT, "again.png").read_bytes()


def test_confusions_of_every_size(tmp_path):
    for name, truth, said in (("one", ["A"], ["A"]), ("lost", ["A", "B"], [None, None]), ("many", [f"label {n}" for n in range(45)], [f"label {n // 2}" for n in range(45)])):
        plots.confusion(tmp_path / f"{name}.png", score(truth, said, [*truth, "never seen"]).to_dict(), name)
        assert pixels(tmp_path / f"{name}.png").min() < 100
    assert pixels(tmp_path / "many.png").shape > pixels(tmp_path / "one.png").shape


def test_size_reliability_and_curves(tmp_path):
    rows = [{"name": "m", "parameters": 6e8, "weighted_f1": 0.5, "weighted_f1_interval": [0.4, 0.6], "seconds_per_window": 2.0}]
    rows += [{"name": "b", "parameters": 0, "weighted_f1": 0.3, "weighted_f1_interval": None, "seconds_per_window": 0.1}]
    plots.size_curve(tmp_path / "size.png", rows)
    plots.reliability(tmp_path / "r.png", {"m": {"ece": 0.1, "curve": [{"events": 3, "probability": 0.5, "accuracy": 1 / 3}]}})
    plots.curves(tmp_path / "c.png", {"m": [(0.5, [0.4, 0.6]), (0.4, [0.3, 0.5])], "b": [(0.3, None), (0.2, [0.1, 0.3])]}, ["clean", "drop=0.1"], "home")
    for name in ("size", "r", "c"):
        assert count(tmp_path / f"{name}.png", "tab:blue") > 20
    assert count(tmp_path / "c.png", "tab:orange") > 20


@pytest.mark.parametrize("values", [[(6e8, 2.1), (8e9, 3.9), (3.2e10, 40)], [(1e5, 0.02), (3.2e10, 40)], [(6e8, 3.2)], [(6e8, 3.2), (1.7e9, 4.1)]])
def test_the_ticks_of_the_size_curve_can_be_read(tmp_path, monkeypatch, values):
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, *rest: figures.append(figure) or save(figure, *rest))
    rows = [{"name": f"m{n}", "parameters": n, "weighted_f1": 0.5, "weighted_f1_interval": None, "seconds_per_window": s} for n, s in values]
    plots.size_curve(tmp_path / "size.png", rows)
    for axes in figures[0].axes:
        shown = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
        boxes = [label.get_window_extent() for label in shown]
        boxes = sorted(box.extents.tolist() for box in boxes if axes.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1 + 1)
        assert len(boxes) >= 2 and all(left[2] + 2 < right[0] for left, right in zip(boxes, boxes[1:])), [label.get_text() for label in shown]


def test_without_matplotlib_it_is_told_and_importing_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert not plots.installed()
    with pytest.raises(UserError, match=r'pip install "harkd\[plot\]"'):
        plots.timeline(tmp_path / "t.png", DAY, RIGHT, LABELS)
    code = "import sys, harkd.scoring.plots, harkd.scoring.report, harkd.eval; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ)).returncode == 0
