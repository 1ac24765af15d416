"""python -m harkd.eval over several data sets, over folds, and by other units than the group: each figure against a count of its own."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from harkd.contestants import contestants
from harkd.eval import EvalSettings, evaluate, main
from harkd.homes.dataset import read
from harkd.jsonl import read_json_lines
from harkd.scoring import predictions
from harkd.scoring.baselines import SensorLookup
from harkd.scoring.metrics import score
from tests.door_cases import lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.marble_files import marble, recording

SENSOR, MAJORITY = ("--model", "baseline:sensor"), ("--model", "baseline:majority")


@pytest.fixture
def other(tmp_path) -> str:
    return f"marble:{marble(tmp_path / 'other', days=6, events=12)}"


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_several_data_sets_have_tables_of_their_own_and_one_for_all(model, mixed, other, tmp_path):
    rows = ("--model", model, *MAJORITY, *SENSOR, "--max-new-tokens", 5)
    code, result, text, _ = outcome(main, *rows, "--data", mixed, "--data", other, "--data", mixed, "--out", tmp_path / "both")
    names, sets = ["tiny with reasoning", "baseline:majority", "baseline:sensor"], [mixed, other]
    assert code == 0 and [(row["data"], row["name"]) for row in result["models"]] == [(data, name) for data in sets for name in names]
    both = metrics(tmp_path / "both")
    assert both["data"] == sets and [(row["data"], row["name"]) for row in both["models"]] == [(data, name) for data in sets for name in names]
    for i, data in enumerate(sets):  # each as if it stood alone: baselines too
        run(main, *rows, "--data", data, "--out", tmp_path / f"alone{i}")
        assert metrics(tmp_path / f"alone{i}")["models"] == both["models"][3 * i : 3 * i + 3]
    table = text[text.index("weighted F1\ndata") :].splitlines()
    assert table[1].split()[-2:] == names[1:] and [line.split()[0] for line in table[2:5]] == [*sets, "mean"]
    first, second = (row["weighted_f1"] for row in result["models"] if row["name"] == "baseline:sensor")
    assert [line.split()[-1] for line in table[2:5]] == [f"{value:.3f}" for value in (first, second, (first + second) / 2)]
    files = {path.name for path in (tmp_path / "both").glob("predictions-*")}
    assert len(files) == 3 and len(lines(tmp_path / "both/predictions-tiny-with-reasoning.jsonl")) == sum(row["windows"] for row in both["models"][::3])
    cost = json.loads((tmp_path / "both/cost.json").read_text())["models"]["tiny with reasoning"]
    assert cost["windows"] == sum(row["windows"] for row in both["models"][::3])
    again = outcome(main, *rows, "--data", mixed, "--data", other, "--out", tmp_path / "both")
    assert again[1] == result and table == again[2][again[2].index("weighted F1\ndata") :].splitlines()[: len(table) - 1] + [table[-1]]


def test_each_file_of_predictions_is_read_once_to_be_scored(tmp_path, monkeypatch):
    seen = Counter()
    monkeypatch.setattr(predictions, "read_json_lines", lambda path: seen.update([path.name]) or read_json_lines(path))
    result = run(main, *SENSOR, *MAJORITY, "--data", "simulated:D3", "--data", "simulated:D4", "--limit", 5, "--out", tmp_path / "out")
    assert seen == {"predictions-baseline-sensor.jsonl": 1, "predictions-baseline-majority.jsonl": 1} and len(result["models"]) == 4


def test_a_baseline_that_labelled_all_is_not_fitted_again(tmp_path, monkeypatch):
    argv = (*SENSOR, "--data", "simulated:D3", "--limit", 5, "--out", tmp_path / "out")
    result = run(main, *argv)
    (tmp_path / "out/result.json").unlink()
    monkeypatch.setattr(SensorLookup, "fit", None)
    assert {**run(main, *argv)["models"][0], "seconds_per_window": 0} == {**result["models"][0], "seconds_per_window": 0}


def test_windows_of_one_name_in_two_data_sets_are_two(mixed, tmp_path):
    """MARBLE's recordings bear the same names in every copy."""
    twin = f"marble:{marble(tmp_path / 'twin', days=8, events=12)}"
    assert {w.id for w in read(mixed).windows("test")} & {w.id for w in read(twin).windows("test")}
    for out, sets in (("one", [mixed, twin]), ("two", [twin, mixed])):
        run(main, *SENSOR, *(flag for data in sets for flag in ("--data", data)), "--out", tmp_path / out)
    one, two = (metrics(tmp_path / out)["models"] for out in ("one", "two"))
    assert one == two[::-1] and one[0]["correct"] != one[1]["correct"]


def test_folds_pool_what_was_predicted_out_of_fold(tmp_path):
    data, k = "simulated:D3", 5
    code, result, text, _ = outcome(main, *MAJORITY, *SENSOR, "--data", data, "--folds", k, "--out", tmp_path / "folds")
    dataset, truth, said = read(data, folds=k), [], []
    for part in dataset.folded():
        fitted = SensorLookup.fit(part.windows("train"), dataset.homes[0].label_names)
        for window in part.windows("test"):
            truth += [event.labels for event in window.events]
            said += fitted.predict(window)
    expected = score(truth, said, dataset.homes[0].label_names)
    row = metrics(tmp_path / "folds")["models"][1]
    assert code == 0 and row["confusion"]["counts"] == expected.to_dict()["confusion"]["counts"] and row["weighted_f1"] == expected.weighted_f1
    assert row["windows"] == len(list(dataset.windows())) and row["groups"] == 56 and row["intervals"]["weighted_f1"] is not None
    assert "too few" not in text and result["models"][1]["weighted_f1_interval"] == row["intervals"]["weighted_f1"]
    run(main, *SENSOR, "--data", data, "--folds", k, "--fold", 2, "--out", tmp_path / "second")
    assert metrics(tmp_path / "second")["models"][0]["windows"] == len(list(dataset.folded()[1].windows("test")))


def test_what_a_split_leaves_out_is_told(tmp_path):
    """Three people who each play both scenarios on their day: what does not test would train on it, and is left out of its fold."""
    for day, who in enumerate("abc"):
        for scenario in ("A1m", "A1e"):
            recording(tmp_path / "data", f"{scenario}/instance{day}", who, 4, day)
    recording(tmp_path / "data", "A1e/instance9", "d", 4, 9)
    recording(tmp_path / "data", "A1m/instance8", "d", 4, 8)
    argv = (*SENSOR, "--data", f"marble:{tmp_path / 'data'}", "--split-by", "scenario")
    assert "; 3 recordings are left out by --split-by scenario" in outcome(main, *argv, "--out", tmp_path / "split")[2]
    assert "; 3 recordings are left out of a fold at most by --split-by scenario" in outcome(main, *argv, "--folds", 2, "--out", tmp_path / "folds")[2]
    assert metrics(tmp_path / "folds")["models"][0]["windows"] == 8


def test_few_groups_are_told_and_what_to_do(tmp_path):
    _, _, text, _ = outcome(main, *SENSOR, "--data", "simulated:D3", "--limit", 60, "--out", tmp_path / "out")
    assert "4 groups are too few for intervals, which need 8: --folds K scores all groups" in text
    code, _, _, err = outcome(main, *SENSOR, "--data", "simulated:D3", "--folds", "4", "--split", "train", "--out", tmp_path / "split")
    assert code == 2 and "--folds tests each fold in turn: leave --split train out" in err and not (tmp_path / "split").exists()


def test_other_units_reach_the_baselines(tmp_path):
    """Trained on the first days, tested on the last, with a day between."""
    run(main, *SENSOR, "--data", "simulated:D3", "--split-by", "days", "--out", tmp_path / "days")
    (row,) = metrics(tmp_path / "days")["models"]
    by_day = {}
    for window in read("simulated:D3").windows():
        by_day.setdefault(window.recording, []).append(window)
    days = list(by_day.values())
    labels = read("simulated:D3").homes[0].label_names
    fitted = SensorLookup.fit((window for day in days[:37] for window in day), labels)
    test = [window for day in days[-11:] for window in day]
    expected = score([event.labels for w in test for event in w.events], [label for w in test for label in fitted.predict(w)], labels)
    assert row["groups"] == 11 and row["weighted_f1"] == expected.weighted_f1


def test_data_sets_may_be_given_in_place_of_names(tmp_path):
    settings = EvalSettings(tuple(contestants(["baseline:sensor"], [], None)), ("clean", "noisy"), str(tmp_path / "out"))
    sets = [read("simulated:D3"), read("simulated:D3", noise="rename=1")]
    named = [replace(dataset, name=name) for dataset, name in zip(sets, settings.data)]
    clean, noisy = evaluate(settings, datasets=named)["models"]
    assert (clean["data"], noisy["data"]) == settings.data and clean["weighted_f1"] > noisy["weighted_f1"]
