"""python -m harkd.eval --report, and the timeline that it draws without being asked."""

import json
import re

import pytest

from harkd.eval import main
from harkd.homes.answer import canonical
from harkd.homes.dataset import read
from harkd.scoring import plots
from tests.door_cases import LABELS, lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.test_doors_eval import answers

pytest.importorskip("matplotlib")


@pytest.fixture
def argv(model, mixed, tmp_path):
    rows = ("--model", model, "--model", "baseline:majority", "--model", "baseline:sensor")
    return [*rows, "--data", mixed, "--data", "simulated:D3", "--out", tmp_path / "out", "--max-new-tokens", 5]


@pytest.fixture
def written(monkeypatch, mixed):
    """All events of a window right, but for the last window, of which all are wrong, and the one before, which has no list."""
    every = [window for data in (mixed, "simulated:D3") for window in read(data).windows("test")]
    truth = {window.id: [event.labels[0] if event.labels else LABELS[0] for event in window.events] for window in every}
    ids = [window.id for window in read(mixed).windows("test")]
    wrong = {label: LABELS[(i + 1) % 3] for i, label in enumerate(LABELS)}

    def write(window):
        if window == ids[-1]:
            return f"````\nI think\n````{canonical([wrong[label] for label in truth[window]])}", "stop"
        return ("no list" if window == ids[-2] else canonical(truth[window])), "stop"

    answers(monkeypatch, write)
    return ids


def test_the_report_holds_the_figures_the_pictures_and_the_worst_windows(argv, written, mixed, tmp_path):
    out = tmp_path / "out"
    first = run(main, *argv)
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG") and not (out / "report.md").exists()
    scores = (out / "metrics.json").read_bytes()
    code, again, text, _ = outcome(main, *argv, "--report")
    report = (out / "report.md").read_text()
    assert code == 0 and again == first and (out / "metrics.json").read_bytes() == scores and f"the report is in {out / 'report.md'}" in text
    shown = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert set(shown) == {path.name for path in out.glob("report-*.png")} and len(shown) == len(set(shown)) == 2 * (3 + 1 + 1)
    for row in first["models"]:
        assert f"{row['weighted_f1']:.3f}" in report and row["data"] in report
    for line in (f"## {mixed}", "## simulated:D3", "### Worst windows: tiny with reasoning"):
        assert line in report.splitlines()
    worst = report[report.index("### Worst windows") : report.index("## simulated:D3")]
    told = re.findall(r"^(\S+), finished by stop:$", worst, flags=re.M)
    assert set(told) == set(written[-2:])  # the others are right
    window = next(window for window in read(mixed).windows("test") if window.id == written[-1])
    assert all(event.description in worst for event in window.events) and worst.count("wrong") == sum(bool(e.labels) for w in read(mixed).windows("test") if w.id in told for e in w.events)
    assert "`" * 11 + "\n````\nI think" in worst and "no list" in worst  # eight in what was written, and three more
    provenance = json.loads(report[report.index("## Provenance") :].split("\n", 3)[3].rsplit("\n", 2)[0])
    assert provenance["command"].startswith("python -m harkd.eval --model") and provenance["command"].endswith("--report")
    assert provenance["versions"]["harkd"] and provenance["settings"]["contestants"][0]["sampling"]["seed"] == 0
    assert set(provenance["windows"]) == {mixed, "simulated:D3"} and provenance["settings"]["inputs"]

    fresh = [*argv, "--out", tmp_path / "fresh"]
    run(main, *fresh, "--report")
    same = {path.name: path.read_bytes() for path in (tmp_path / "fresh").glob("report-confusion-*")}
    assert same == {path.name: path.read_bytes() for path in out.glob("report-confusion-*")} and (tmp_path / "fresh/metrics.json").read_bytes() == scores
    run(main, *fresh, "--overwrite")
    assert not list((tmp_path / "fresh").glob("report*"))


def test_probabilities_of_guided_answers_are_calibrated_and_shown(argv, written, tmp_path):
    run(main, *argv)
    path = tmp_path / "out/predictions-tiny-with-reasoning.jsonl"
    records = [{**line, "probabilities": [{label: 0.8 for label in LABELS} | {said: 0.8} for said in line["answer"]]} for line in lines(path)]
    for record in records:
        record["probabilities"] = [{key: p for key, p in of.items() if key is not None} for of in record["probabilities"]]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "out/result.json").unlink()
    run(main, *argv, "--report")
    models = json.loads((tmp_path / "out/metrics.json").read_text())["models"]
    guided, simulated = models[0]["calibration"], models[3]["calibration"]
    given = models[0]["scored"] - models[0]["missing"]
    assert guided["events"] == given and guided["ece"] == pytest.approx(abs(0.8 - models[0]["correct"] / given))
    assert simulated["ece"] == pytest.approx(0.2) and models[1]["calibration"] is None
    assert "report-calibration-1.png" in (tmp_path / "out/report.md").read_text() and (tmp_path / "out/report-calibration-2.png").exists()


def test_without_matplotlib_a_report_is_refused_at_once_and_the_rest_goes_on(argv, written, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, _, _, err = outcome(main, *argv, "--report")
    assert code == 2 and 'pip install "harkd[plot]"' in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    run(main, *argv)
    assert (tmp_path / "out/metrics.json").exists() and not (tmp_path / "out/timeline.png").exists()
