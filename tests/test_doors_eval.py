"""python -m harkd.eval: rows, scores, files, and what may not be compared."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from harkd.contestants import contestants
from harkd.eval import main
from harkd.homes.answer import canonical
from harkd.homes.dataset import read
from harkd.sampling import generator
from harkd.sampling.request import recommended
from harkd.train import main as train
from tests.door_cases import LABELS, child, content, kill, lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.marble_files import labels, marble

BASELINES = ("--model", "baseline:majority", "--model", "baseline:sensor")


@pytest.fixture(scope="module")
def adapter(model, mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters") / "truth"
    run(train, "--model", model, "--train-on", "truth", "--data", mixed, "--out", out, "--epochs", 1, "--limit", 2, "--lr", 0.05, "--validation", 0)
    return str(out)


@pytest.fixture
def argv(model, mixed, tmp_path):
    return ["--model", model, "--data", mixed, "--out", tmp_path / "out", "--max-new-tokens", 5]


def answers(monkeypatch, write):
    """Let the generator write `write(window)` in place of what the model says."""

    def generate(self, requests):
        for request in requests:
            text, reason = write(request.window)
            yield generator.Completion(request, text, [1, 2], [-0.5, -0.5], reason, 10)

    monkeypatch.setattr(generator.Generator, "generate", generate)


def test_model_adapter_and_baselines_in_one_call(argv, adapter, model, mixed, tmp_path):
    code, result, text, _ = outcome(main, *argv, "--adapter", adapter, *BASELINES)
    out, names = tmp_path / "out", ["tiny without reasoning", "tiny + truth", "baseline:majority", "baseline:sensor"]
    assert code == 0 and [row["name"] for row in result["models"]] == names
    for row in result["models"]:
        assert {"weighted_f1", "macro_f1", "accuracy", "malformed", "parameters", "seconds_per_window"} <= set(row)
    windows = list(read(mixed).windows("test"))
    events = [event for window in windows for event in window.events]
    scored = [event for event in events if event.labels]
    assert len(events) > len(scored) and f"{len(windows)} windows of test, {len(events)} events, of which {len(scored)} are scored" in text
    table = [line for line in text.splitlines() if line.startswith(tuple(names))]
    first, last = (row["weighted_f1"] for row in (result["models"][0], result["models"][-1]))
    assert len(table) == 4 and f"{last - first:+.3f}" in table[-1] and "gap" in text and "ratio" in text
    metrics, cost, settings = (json.loads((out / name).read_text()) for name in ("metrics.json", "cost.json", "settings.json"))
    assert [row["name"] for row in metrics["models"]] == names and (metrics["split"], metrics["data"]) == ("test", [mixed])
    for row in metrics["models"]:
        assert (row["windows"], row["events"], row["scored"]) == (len(windows), len(events), len(scored))
        assert set(row["per_label"]) == set(LABELS) and sum(map(sum, row["confusion"]["counts"])) == len(scored)
    assert [row["sampling"] for row in settings["contestants"]][2:] == [None, None]
    assert settings["contestants"][0]["sampling"] == settings["contestants"][1]["sampling"] and not settings["contestants"][0]["thinking"]
    base, adapted, majority, _ = (cost["models"][name] for name in names)
    assert adapted["parameters"] == base["parameters"] > 1000 and base["bytes"] == 4 * base["parameters"] and majority["parameters"] == 0
    assert base["windows"] == len(windows) and base["seconds_per_window"] > 0 and base["prompt_tokens_per_window"] > 100 and 0 < base["completion_tokens_per_window"] <= 5
    assert base["peak_memory_bytes"]["cpu"] > 1e6 and "seconds" not in (out / "metrics.json").read_text()
    predictions = lines(out / "predictions-tiny-without-reasoning.jsonl")
    assert {line["window"] for line in predictions} == {window.id for window in windows} and len(predictions) == len(windows)
    assert set(predictions[0]) == {"data", "window", "home", "group", "recording", "truth", "answer", "causes", "text", "finish_reason", "tokens", "mean_logprob", "seconds"}

    again = outcome(main, *argv, "--adapter", adapter, *BASELINES)
    assert again[1] == result and "is done" in again[3] and table == [line for line in again[2].splitlines() if line.startswith(tuple(names))]
    run(main, *argv, "--adapter", adapter, *BASELINES, "--out", tmp_path / "second", "--batch", 1)
    assert content(tmp_path / "second")["metrics.json"] == content(out)["metrics.json"]
    majority, again = (lines(folder / "predictions-baseline-majority.jsonl") for folder in (out, tmp_path / "second"))
    assert [{**line, "seconds": 0} for line in majority] == [{**line, "seconds": 0} for line in again]


def test_perfect_and_wrong_answers(argv, mixed, monkeypatch, tmp_path):
    truth = {window.id: [event.labels[0] if event.labels else "EATING" for event in window.events] for window in read(mixed).windows()}
    other = {"COOKING": "EATING", "EATING": "WATCHING_TV", "WATCHING_TV": "COOKING"}
    cases = {
        "right": (lambda window: (canonical(truth[window]), "stop"), (1, 1, 1, 0, 0)),
        "wrong": (lambda window: (canonical([other[label] for label in truth[window]]), "stop"), (0, 0, 0, 0, 0)),
        "cut off": (lambda window: (canonical(truth[window]), "length"), (0, 0, 0, 1, None)),
        "prose": (lambda window: ("COOKING, I think.", "stop"), (0, 0, 0, 1, None)),
        "unknown": (lambda window: (canonical(["DANCING"] * len(truth[window])), "stop"), (0, 0, 0, 0, None)),
    }
    for name, (write, expected) in cases.items():
        answers(monkeypatch, write)
        (row,) = run(main, *argv, "--out", tmp_path / name)["models"]
        (metrics,) = json.loads((tmp_path / name / "metrics.json").read_text())["models"]
        missing = metrics["scored"] if expected[-1] is None else 0
        assert (row["weighted_f1"], row["macro_f1"], row["accuracy"], row["malformed"], row["missing"]) == (*expected[:-1], missing), name
        cause = {"cut off": "length", "prose": "no_list", "unknown": "unknown_label"}.get(name)
        assert metrics["causes"] == ({cause: metrics["events"]} if cause else {})
        assert sum(label["support"] for label in metrics["per_label"].values()) == metrics["scored"]


def test_killed_and_continued(argv, mixed, tmp_path):
    run(main, *argv, "--split", "all")
    out, path = tmp_path / "killed", tmp_path / "killed/predictions-tiny-with-reasoning.jsonl"
    argv = [*argv, "--split", "all", "--out", out, "--batch", 1]
    for count in (1, 9):
        kill(child("eval", *argv), lambda: path.exists() and path.read_bytes().count(b"\n") >= count)
    assert path.read_bytes().count(b"\n") < 16 and not (out / "metrics.json").exists()
    path.write_bytes(path.read_bytes() + b'{"window": "marb')
    (row,) = run(main, *argv)["models"]
    assert len(lines(path)) == len({line["window"] for line in lines(path)}) == 16
    (cost,) = json.loads((out / "cost.json").read_text())["models"].values()  # of all three processes
    seconds = sum(line["seconds"] for line in lines(path))
    assert cost["windows"] == 16 and cost["seconds"] == pytest.approx(seconds) and row["seconds_per_window"] == pytest.approx(seconds / 16)
    assert cost["completion_tokens"] == sum(line["tokens"]["completion"] for line in lines(path))
    assert (out / "metrics.json").read_bytes() == (tmp_path / "out/metrics.json").read_bytes()


def test_a_continued_run_loads_and_fits_nothing_that_is_done(argv, adapter, monkeypatch, tmp_path):
    argv = [*argv, *BASELINES, "--adapter", adapter]
    result = run(main, *argv)
    before = json.loads((tmp_path / "out/cost.json").read_text())["models"]
    (tmp_path / "out/result.json").unlink()
    monkeypatch.setattr("harkd.eval.load_generator", None)
    monkeypatch.setattr("harkd.eval.baseline", None)
    assert run(main, *argv) == result
    after = json.loads((tmp_path / "out/cost.json").read_text())["models"]
    assert all(row.pop("peak_memory_bytes")["cpu"] > 1e6 for row in before.values()) and after == before  # no memory is told of what did not run


def test_overwrite_leaves_no_predictions_of_the_run_before(argv, tmp_path):
    run(main, *argv, *BASELINES, "--limit", 1)
    assert outcome(main, *BASELINES, *argv[2:], "--limit", 1)[0] == 2
    run(main, *BASELINES, *argv[2:], "--limit", 1, "--overwrite")
    assert {path.name for path in (tmp_path / "out").glob("pred*")} == {"predictions-baseline-majority.jsonl", "predictions-baseline-sensor.jsonl"}


def noted(source, folder, **notes):
    """A copy of an adapter with other notes."""
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "harkd.json").write_text(json.dumps({**json.loads((source / "harkd.json").read_text()), **notes}))
    return str(folder)


@pytest.mark.parametrize("name", ["~no-such-user/x", "x" * 5000])
def test_a_name_that_no_folder_can_have_is_told(name, model, tmp_path):
    for flags in (["--model", name], ["--model", model, "--adapter", name]):
        code, _, _, err = outcome(main, *flags, "--out", tmp_path / "out")
        assert code == 2 and f"{name!r} is neither a folder nor a hub id" in err and err.count("\n") == 1


def test_a_base_row_for_every_mode_that_an_adapter_uses(model, adapter, tmp_path):
    def rows(*arguments):
        return [(row.name, row.thinking) for row in contestants(*arguments)]

    reasoning = noted(Path(adapter), tmp_path / "reasoning", thinking=True)
    again = noted(Path(adapter), tmp_path / "b/reasoning", thinking=True)
    assert rows([model], [], None) == rows([model], [], True) == [("tiny with reasoning", True)]
    assert rows([model], [], False) == [("tiny without reasoning", False)]
    assert rows([model], [adapter], None) == rows([model, model], [adapter, adapter], False) == [("tiny without reasoning", False), ("tiny + truth", False)]
    assert rows([model], [adapter, reasoning], None) == [
        ("tiny without reasoning", False), ("tiny with reasoning", True), ("tiny + truth", False), ("tiny + reasoning", True),
    ]  # fmt: skip
    assert rows([model], [reasoning, again], None)[1:] == [(f"{model} + {reasoning} #2", True), (f"{model} + {again} #3", True)]
    assert rows(["baseline:sensor", model, "org/other"], [adapter], None) == [
        ("baseline:sensor", False), ("tiny without reasoning", False), ("tiny + truth", False), ("other with reasoning", True),
    ]  # fmt: skip
    peft = Path(shutil.copytree(adapter, tmp_path / "peft"))
    (peft / "harkd.json").unlink()
    spelled = f"{Path(model).parent}/../{Path(model).parent.name}/tiny"
    assert rows([spelled, "org/other"], [adapter, str(peft)], False)[1:3] == [("tiny + truth", False), ("tiny + peft", False)]
    long = [f"{letter * 150}/{'n' * 150}" for letter in "xy"]
    found = contestants([model, "x/a-b", "y/a b", "z/a b", "u/Cd", "v/cD", *long], [], None)
    files = [row.file for row in found]
    assert len({file.casefold() for file in files}) == 8 and max(map(len, files)) < 255
    assert {row.sampling for row in found} == {recommended(True)}
    assert all(re.fullmatch(r"predictions-[\w.+-]+\.jsonl", file) for file in files)


@pytest.mark.parametrize(
    ("notes", "flags", "message"),
    [
        ({}, ["--thinking"], "was trained without reasoning: leave --thinking"),
        ({"thinking": True}, ["--no-thinking"], "was trained with reasoning: leave --thinking"),
        ({"template": "0"}, [], "was trained with template '0'"),
        ({"answer_form": "0"}, [], "was trained with answer_form '0'"),
        ({"base_fingerprint": "0"}, [], "was trained on another base"),
        ({"base": "org/other"}, ["--model", "org/third"], "was trained on org/other, which is not among --model"),
    ],
)
def test_what_may_not_be_compared_is_refused(argv, adapter, tmp_path, notes, flags, message):
    code, _, _, err = outcome(main, *argv, "--adapter", noted(Path(adapter), tmp_path / "adapter", **notes), *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_each_row_has_its_own_peak_of_memory(argv, model, monkeypatch, tmp_path):
    """A model that runs after a hungry one does not inherit its peak, and the run's peak is the highest."""
    sizes = [100_000_000, 0]

    def write(window):
        bytearray(b"x") * sizes.pop(0)  # held for a moment
        return "no list", "stop"

    answers(monkeypatch, write)
    run(main, *argv, "--model", shutil.copytree(model, tmp_path / "second"), "--limit", 1)
    cost = json.loads((tmp_path / "out/cost.json").read_text())
    first, second = (row["peak_memory_bytes"]["cpu"] for row in cost["models"].values())
    assert cost["peak_memory_bytes"]["cpu"] == max(first, second)
    if sys.platform == "linux":
        assert first > second + 50_000_000


def test_training_files_at_fault_are_told_before_a_model_runs(argv, monkeypatch, tmp_path):
    """The baselines, which read them, are first to answer."""
    asked = []
    answers(monkeypatch, lambda window: asked.append(window) or ("", "stop"))
    data = marble(tmp_path / "broken")
    for found in read(f"marble:{data}").recordings("train"):
        labels(data / found.id, "1", (0, 9, "TRANSITION"))
    code, _, _, err = outcome(main, *argv, "--data", f"marble:{data}", *BASELINES)
    assert code == 2 and "no labelled event" in err and not asked


def test_a_broken_contestant_is_told_before_the_others_run(argv, tmp_path):
    code, _, _, err = outcome(main, *argv, "--model", tmp_path)
    assert code == 2 and err.count("\n") == 1 and str(tmp_path) in err and not (tmp_path / "out").exists()
    assert outcome(main, *argv, "--model", "baseline:luck")[0] == 2


def test_a_base_that_was_replaced_is_other_settings(argv, model, tmp_path):
    from tests.tiny import tiny_model

    base = shutil.copytree(model, tmp_path / "base")
    argv = ["--model", base, *argv[2:], "--limit", 1]
    first = run(main, *argv)
    for path in base.iterdir():
        path.touch()
    assert run(main, *argv) == first  # what counts is the content
    tiny_model(base, seed=7, num_hidden_layers=1)
    code, _, _, err = outcome(main, *argv)
    assert code == 2 and f"other settings (inputs.{base}: " in err and err.count("\n") == 1


def test_folds_warn_of_what_an_adapter_was_trained_on(argv, adapter, tmp_path):
    code, result, _, err = outcome(main, *argv, "--adapter", adapter, "--folds", 2, "--limit", 1)
    assert code == 0 and len(result["models"]) == 2 and "warning: --folds scores all windows" in err
    assert "warning" not in outcome(main, *argv, "--folds", 2, "--limit", 1, "--out", tmp_path / "plain")[3]
