"""Curves over levels of noise and over weeks: what changes, when, and for whom."""

import json
import re

import pytest

from harkd.eval import EvalSettings, _lost
from harkd.homes.dataset import ReadOptions
from harkd.scoring import plots
from tests.door_cases import outcome
from tools import robustness
from tools.robustness import drift, levels, main

KINDS = ("nothing", "sensor", "routine", "resident")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(robustness, "LEARNT", 4)
    monkeypatch.setattr(robustness, "PERIOD", 2)


def told(dataset, split="test"):
    return [event for window in dataset.windows(split) for event in window.events]


def test_each_kind_changes_what_it_says_from_its_day_on(short):
    found = drift("D3")
    assert set(found) == set(KINDS) and {len(curve) for curve in found.values()} == {3}
    learnt = {str(told(curve[i], "train")) for curve in found.values() for i in (0, 1)}
    begins = {str(told(curve[0])) for curve in found.values()}
    assert len(begins) == 1 and len({curve[0].name for curve in found.values()}) == 1
    nothing, sensor, routine, resident = (told(found[kind][1]) for kind in KINDS)
    later = [(event.time - other.time).total_seconds() for event, other in zip(routine, nothing, strict=True)]
    assert set(later) == {3 * 3600} and len(learnt) == 2  # what noise the options ask for is taken away when baselines are fitted
    gone = [event for _, event in found["sensor"][1].lost("test")]
    assert len({(event.room, event.sensor) for event in gone}) == 1 and len(gone) > 0.05 * len(nothing)
    few = [len(list(_lost(EvalSettings((), "", "", limit=limit), found["sensor"][1]))) for limit in (20, 10**6)]
    assert 0 < few[0] < few[1] <= len(gone)
    assert sorted(map(str, [*sensor, *gone])) == sorted(map(str, nothing)) and any((e.room, e.sensor) == (gone[0].room, gone[0].sensor) for e in told(found["sensor"][1], "train"))
    assert len({e.resident for e in resident}) == len({e.resident for e in nothing}) + 1 and not list(found["resident"][1].lost("test"))
    days = [{event.time.date() for event in told(dataset)} for dataset in found["nothing"]]
    assert not days[0] & days[1] and not days[1] & days[2] and not days[0] & {event.time.date() for event in told(found["nothing"][0], "train")}


def test_curves_of_drift(short, tmp_path):
    argv = (tmp_path / "out", "--model", "baseline:naive-bayes", "--model", "baseline:majority", "--data", "simulated:D3", "--drift")
    code, result, text, _ = outcome(main, *argv)
    assert code == 0 and len(result["models"]) == 2 * (1 + 2 * 4)
    at = {row["data"]: row for row in result["models"] if row["name"] == "baseline:naive-bayes"}
    nothing, sensor, routine = (next(row for data, row in at.items() if data.startswith(kind)) for kind in KINDS[:3])
    assert sensor["missing"] > 0 == nothing["missing"] and sensor["weighted_f1"] < nothing["weighted_f1"] and routine["weighted_f1"] < nothing["weighted_f1"] - 0.1
    metrics = json.loads((tmp_path / "out/eval/metrics.json").read_text())["models"]
    scored = {row["data"].split(",")[0]: row["scored"] for row in metrics}
    assert scored["nothing"] == scored["sensor"] == scored["routine"]
    if plots.installed():
        assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"{kind}.png" for kind in KINDS}
    assert outcome(main, *argv)[1] == result


def test_curves_of_noise(tmp_path):
    argv = (tmp_path / "out", "--model", "baseline:sensor", "--data", "simulated:D3", "--limit", 20)
    code, result, _, _ = outcome(main, *argv, "--level", "", "--level", "drop=0.2", "--level", "drop=0.5", "--level", "drop=0.2")
    assert code == 0 and [row["data"] for row in result["models"]] == ["clean", "drop=0.2", "drop=0.5"]
    missing = [row["missing"] for row in result["models"]]
    assert missing[0] == 0 < missing[1] < missing[2] and [dataset.options.noise for dataset in levels("simulated:D3", ["", "ghost=1"], ReadOptions())] == ["", "ghost=1"]
    code, _, _, err = outcome(main, *argv[:-3], "simulated:D4", *argv[-2:], "--level", "", "--level", "drop=0.2", "--level", "drop=0.5")
    assert code == 2 and "holds a run with other settings (data.0: 'simulated:D3', now 'simulated:D4')" in err
    for flags, message in (
        (["--drift", "--data", "marble:x"], "--drift needs a simulated home"), ([], "is required"), (["--level", "dropp=1"], "'dropp=1'"),
        (["--level", "", "--noise", "drop=0.1"], "--level names the noise"), (["--drift", "--folds", "3"], "--drift has days of its own"),
        (["--level", "", "--limit", "0"], "--limit must be at least 1"),
    ):  # fmt: skip
        code, _, _, err = outcome(main, tmp_path / "other", *argv[1:], *flags)
        assert code == 2 and message in err and err.count("\n") == 1


def test_the_report_shows_the_curves(tmp_path):
    pytest.importorskip("matplotlib")
    argv = (tmp_path / "out", "--model", "baseline:sensor", "--data", "simulated:D3", "--limit", 5, "--level", "", "--level", "drop=0.5", "--report")
    code, result, _, _ = outcome(main, *argv)
    text = (tmp_path / "out/eval/report.md").read_text()
    assert code == 0 and "![noise](../noise.png)" in text and all(f"{row['weighted_f1']:.3f}" in text for row in result["models"])
    assert "## clean" in text and "## drop=0.5" in text and '"command": "python -m tools.robustness' in text
    assert all((tmp_path / "out/eval" / name).exists() for name in re.findall(r"\]\((.*?)\)", text))
