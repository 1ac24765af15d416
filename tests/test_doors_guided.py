"""--guided, --max-thinking and --exact-probabilities at the doors."""

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


def test_exact_probabilities_are_those_of_guided_answers(argv, tmp_path):
    for door in (main, evaluate):
        code, _, _, err = outcome(door, *argv[:-1], "--exact-probabilities")
        assert code == 2 and "give --guided too" in err and not (tmp_path / "out").exists()
