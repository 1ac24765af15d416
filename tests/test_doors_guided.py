"""--guided, --max-thinking and --exact-probabilities at the doors."""

import csv
import json

import pytest

from harkd.distill.traces import read_traces
from harkd.eval import main as evaluate
from harkd.generate import main
from harkd.homes.answer import canonical
from tests.door_cases import LABELS, data, lines, model, outcome, run, short_prompts  # noqa: F401


@pytest.fixture
def argv(model, data, tmp_path):
    return ["--model", model, "--data", data, "--out", tmp_path / "out", "--guided"]


def test_guided_traces_are_whole_and_hold_probabilities(argv, tmp_path):
    argv = [*argv, "--samples", 2, "--max-thinking", 7, "--temperature", 1]  # 4,096 tokens would not fit
    result = run(main, *argv)
    assert result["traces"] == 8 and result["incomplete"] == 0 and result["causes"] == {}
    for trace in read_traces(tmp_path / "out"):
        assert trace.guided and trace.finish_reason == "stop" and trace.messages[-1]["content"] == canonical(trace.answer)
        assert trace.tokens["completion"] < 200 and len(trace.probabilities) == 3
        for label, event in zip(trace.answer, trace.probabilities):
            assert set(event) == set(LABELS) and event[label] > 0 and sum(event.values()) == pytest.approx(1, abs=1e-5)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["guiding"] == {"guided": True, "exact": False} and settings["sampling"]["max_thinking"] == 7
    assert run(main, *argv) == result
    code, _, _, err = outcome(main, *argv, "--exact-probabilities")
    assert code == 2 and "other settings (guiding.exact" in err


def test_guided_predictions_are_well_formed_and_recorded(argv, tmp_path):
    argv = [*argv, "--temperature", 0, "--no-thinking", "--model", "baseline:majority"]
    result = run(evaluate, *argv)
    assert [row["malformed"] for row in result["models"]] == [0, 0]
    model_file, baseline_file = sorted((tmp_path / "out").glob("predictions-*.jsonl"), key=lambda path: "baseline" in path.name)
    for record in lines(model_file):
        assert record["guided"] and record["text"] == canonical(record["answer"]) and record["causes"] == {}
        assert [max(event, key=event.get) for event in record["probabilities"]] == record["answer"]  # these labels differ in their first token
    assert all("guided" not in record for record in lines(baseline_file))
    free = run(evaluate, *[part for part in argv if part != "--guided"], "--out", tmp_path / "free", "--max-new-tokens", 5)
    assert free["models"][0]["malformed"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", 9], "guided answer to .* takes up to .* raise --max-new-tokens"),
        (["--max-thinking", -1], "max-thinking must be 0 or more"),
        (["--export-prompts", "x"], "--guided is for a model that runs here"),
        (["--import-completions", "x"], "--guided is for a model that runs here"),
    ],
)
def test_mistakes_are_told_and_claim_no_folder(argv, tmp_path, more, message):
    import re

    code, _, _, err = outcome(main, *argv, *more)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1 and not (tmp_path / "out").exists()


ODD = ("EAT", "EAT, or drink", "EATING", 'say "hi", \\ then', "¿caña?", "漢字", "[x", "🏠 home")


@pytest.mark.filterwarnings("ignore:Glyph")  # in the timeline's font
def test_odd_labels_are_written_read_and_scored(model, tmp_path):
    """Labels that begin others, with quotes, commas, backslashes, brackets and letters of any script; a last window of one event."""
    rooms = {'kitchen "big"': ["fridge, left"], "räum\\e": ["门"]}
    home = {"name": "odd", "rooms": rooms, "labels": dict.fromkeys(ODD, ""), "rules": ["Be brief."]}
    rows = [["time", "sensor", "room", "state", "label"]]
    for n in range(33):
        room, sensor = (('kitchen "big"', "fridge, left"), ("räum\\e", "门"))[n % 2]
        rows.append([f"2024-05-{1 + n // 11:02d} 07:00:{n % 11:02d}", sensor, room, "on", ODD[n % len(ODD)]])
    (tmp_path / "home").mkdir()
    (tmp_path / "home/home.json").write_text(json.dumps(home))
    with open(tmp_path / "home/events.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    common = ["--model", model, "--data", f"csv:{tmp_path / 'home'}", "--split", "all", "--no-thinking", "--guided", "--exact-probabilities"]
    common += ["--temperature", 5, "--max-new-tokens", 1500]
    result = run(main, *common, "--out", tmp_path / "out")
    traces = list(read_traces(tmp_path / "out"))
    assert result["traces"] == len(traces) == 6 and result["incomplete"] == 0 and {len(trace.answer) for trace in traces} == {10, 1}
    for trace in traces:
        assert trace.labels == list(ODD) and set(trace.answer) <= set(ODD) and trace.messages[-1]["content"] == canonical(trace.answer)
        assert all(set(event) == set(ODD) and sum(event.values()) == pytest.approx(1, abs=1e-4) for event in trace.probabilities)
    assert len({label for trace in traces for label in trace.answer}) > 3 and {label for trace in traces for [label] in trace.truth} == set(ODD)
    assert run(evaluate, *common, "--out", tmp_path / "eval")["models"][0]["malformed"] == 0
    (tmp_path / "home/events.csv").write_text("time,sensor,room,state\n")
    code, _, _, err = outcome(main, *common, "--out", tmp_path / "none")
    assert code == 2 and err.count("\n") == 1 and "holds no window" in err and not (tmp_path / "none").exists()


def test_exact_probabilities_are_those_of_guided_answers(argv, tmp_path):
    for door in (main, evaluate):
        code, _, _, err = outcome(door, *argv[:-1], "--exact-probabilities")
        assert code == 2 and "give --guided too" in err and not (tmp_path / "out").exists()
