"""python -m harkd.eval: baselines against an independent count, their intervals, and what noise takes."""

import json
import shutil
from collections import Counter, defaultdict

import pytest

from harkd.eval import EvalSettings, _lost, main
from harkd.homes.dataset import read
from harkd.scoring import sequence_baselines
from harkd.scoring.baselines import BASELINES as BASELINE_NAMES
from tests.door_cases import LABELS, lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.marble_files import environment, labels

BASELINES = ("--model", "baseline:majority", "--model", "baseline:sensor")


@pytest.fixture
def argv(model, mixed, tmp_path):
    return ["--model", model, "--data", mixed, "--out", tmp_path / "out", "--max-new-tokens", 5]


def test_the_baselines_equal_an_independent_count(argv, mixed, tmp_path):
    run(main, *BASELINES, *argv[2:])
    dataset, at = read(mixed), defaultdict(Counter)
    for window in dataset.windows("train"):
        for event in window.events:
            at[event.sensor].update(event.labels)
    majority = max(LABELS, key=lambda label: sum(counts[label] for counts in at.values()))
    by_sensor = {sensor: max(LABELS, key=lambda label: counts[label]) for sensor, counts in at.items() if counts}
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["models"]
    for row, predict in zip(metrics, (lambda event: majority, lambda event: by_sensor.get(event.sensor, majority)), strict=True):
        pairs = [(event.labels[0], predict(event)) for window in dataset.windows("test") for event in window.events if event.labels]
        f1 = []
        for label in LABELS:
            hit = sum(pair == (label, label) for pair in pairs)
            true, said = sum(t == label for t, _ in pairs), sum(p == label for _, p in pairs)
            f1.append((true, 2 * hit / (true + said) if true + said else 0))
        assert row["accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
        assert row["weighted_f1"] == pytest.approx(sum(n * f for n, f in f1) / len(pairs))
        assert row["macro_f1"] == pytest.approx(sum(f for n, f in f1 if n) / sum(n > 0 for n, _ in f1))
    assert 0 < metrics[0]["accuracy"] < 1 and metrics[1]["accuracy"] != metrics[0]["accuracy"]


EVERY_BASELINE = [flag for name in BASELINE_NAMES for flag in ("--model", f"baseline:{name}")]


@pytest.fixture
def varied(tmp_path) -> str:
    """Eight days like `mixed`, of which none is like another."""
    for day in range(8):
        start, folder = day * 86_400, tmp_path / f"varied/A1a/instance{day + 1}"
        environment(folder, *((("R7", "E2", "P8", "P1")[n * (day + 1) % 7 % 4], ("ON", "OFF")[n % 2], start + n, "1") for n in range(24)))
        parts = zip((0, 3 + day, 12, 20), (2 + day, 11, 17, 23), ("COOKING", "WATCHING_TV", "EATING", "COOKING"))
        labels(folder, "1", *((start + first, start + last, label) for first, last, label in parts))
    return f"marble:{tmp_path / 'varied'}"


def test_every_baseline_has_intervals_and_the_same_figures_each_time(argv, varied, monkeypatch, tmp_path):
    monkeypatch.setattr(sequence_baselines, "FEWEST", 10)
    argv = ["--data", varied, *argv[4:]]
    code, result, text, _ = outcome(main, *EVERY_BASELINE, *argv, "--split", "all")
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())["models"]
    assert code == 0 and [row["name"] for row in metrics] == [f"baseline:{name}" for name in BASELINE_NAMES]
    for row, told in zip(metrics, result["models"], strict=True):
        low, high = row["intervals"]["weighted_f1"]
        assert row["groups"] == 8 and low < row["weighted_f1"] < high and told["weighted_f1_interval"] == [low, high]
        assert f"{row['weighted_f1']:.3f} [{low:.3f}, {high:.3f}]" in text
        assert row["against_first"] is None or set(row["against_first"]) == {"weighted_f1", "macro_f1", "accuracy"}
    assert [row["against_first"] is None for row in metrics] == [True] + [False] * 5
    assert metrics[1]["against_first"]["accuracy"]["difference"] == pytest.approx(metrics[1]["accuracy"] - metrics[0]["accuracy"])

    again = shutil.copytree(out, tmp_path / "again")
    path = again / "predictions-baseline-hmm-recording.jsonl"
    first, *_, last = path.read_text().splitlines(keepends=True)
    path.write_text(first + last)  # the other windows of these recordings are gone, and still the whole recordings are seen
    for name in ("result.json", "metrics.json", *(f"predictions-baseline-{name}.jsonl" for name in ("naive-bayes", "hmm", "bigru"))):
        (again / name).unlink()
    run(main, *EVERY_BASELINE, *argv, "--split", "all", "--out", again)
    assert (again / "metrics.json").read_bytes() == (out / "metrics.json").read_bytes()
    written, before = (sorted(str({**record, "seconds": 0}) for record in lines(file)) for file in (path, out / path.name))
    assert written == before

    run(main, *BASELINES, *argv, "--out", tmp_path / "few")  # a split of two groups
    assert [row["intervals"] for row in json.loads((tmp_path / "few/metrics.json").read_text())["models"]] == [None, None]


def test_with_noise_what_is_lost_is_missing_and_baselines_know_the_clean_home(argv, mixed, tmp_path):
    def rows(*flags):
        run(main, *BASELINES, *argv[2:], "--split", "all", "--out", tmp_path / "-".join(flags), *flags)
        return json.loads((tmp_path / "-".join(flags) / "metrics.json").read_text())["models"]

    majority, sensor = rows("--noise", "")
    gone = [event for _, event in read(mixed, noise="drop=0.3", noise_seed=2).lost()]
    for row, clean in zip(rows("--noise", "drop=0.3", "--noise-seed", "2"), (majority, sensor)):
        assert (row["scored"], row["events"]) == (clean["scored"], clean["events"]) and clean["missing"] == 0
        assert row["missing"] == sum(bool(event.labels) for event in gone) > 10 and row["causes"] == {"dropped": len(gone)}
        assert {name: label["support"] for name, label in row["per_label"].items()} == {name: label["support"] for name, label in clean["per_label"].items()}
        assert row["correct"] < clean["correct"]
    ghosts, _ = rows("--noise", "ghost=0.5")
    assert ghosts["events"] > majority["events"] and (ghosts["scored"], ghosts["correct"]) == (majority["scored"], majority["correct"])
    assert rows("--noise", "rename=1")[1]["accuracy"] == majority["accuracy"] < sensor["accuracy"]  # no sensor is known
    limited, _ = rows("--noise", "drop=0.3", "--limit", "1")
    (window,) = list(read(mixed, noise="drop=0.3").windows())[:1]
    assert limited["events"] == max(event.id for event in window.events) + 1  # as far as the window reaches
    code, _, _, err = outcome(main, *BASELINES, *argv[2:], "--out", tmp_path / "clean")
    assert code == 0 and "warning" not in err
    err = outcome(main, *BASELINES, *argv[2:], "--split", "all", "--out", tmp_path / "all")[3]
    assert "warning: --split all scores baselines on the windows that they were fitted on, too" in err
    code, _, _, err = outcome(main, *argv, "--noise", "dropp=1")
    assert code == 2 and "'dropp=1'" in err and err.count("\n") == 1


def test_what_is_lost_is_counted_as_far_as_windows_reach_even_where_the_last_holds_ghosts_alone(mixed):
    ghosts_alone = 0
    for seed in range(10):
        dataset = read(mixed, noise="drop=0.6,ghost=0.6", noise_seed=seed)
        windows = list(dataset.windows())
        reach = Counter()
        for window in windows:
            reach[window.recording] = max(reach[window.recording], *(event.id for event in window.events))
        last = {window.recording: window for window in windows}
        ghosts_alone += sum(max(event.id for event in window.events) < 0 < reach[name] for name, window in last.items())
        expected = [(it.group, event.labels) for it, event in dataset.lost() if event.id < reach[it.id]]
        settings = EvalSettings((), mixed, "", split="all", limit=len(windows), options=dataset.options)
        assert list(_lost(settings, dataset)) == expected and expected
    assert ghosts_alone
