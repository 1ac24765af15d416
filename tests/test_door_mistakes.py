"""A user's mistake in files ends a door with exit code 2 and one line on stderr that names the culprit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harkd.eval import main as evaluate
from harkd.generate import main as generate
from harkd.train import main as train
from tests.door_cases import data, model, outcome, run, short_prompts  # noqa: F401
from tests.marble_files import environment
from tests.mistake_cases import DOORS, doors, every_door, refused  # noqa: F401


def damaged_data(root: Path, file: str, old: str, new: str) -> str:
    path = root / "A1a/instance1" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return f"marble:{root}"


@every_door
@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("environmental.csv", "sensor_id", "sensor", ["environmental.csv has no column 'sensor_id'"]),
        ("environmental.csv", '"OFF"', '"MAYBE"', ["environmental.csv, line 3", "'MAYBE'"]),
        ("subject-1/labels.csv", "COOKING", "DANCING", ["labels.csv, line 2: unknown activity 'DANCING'"]),
        ("subject-1/labels.csv", "act", "activity", ["labels.csv has no column 'act'"]),
    ],
)
def test_damaged_data(doors, door, data, tmp_path, file, old, new, words):
    shutil.copytree(data.removeprefix("marble:"), tmp_path / "data")
    refused(door, [*doors[door], "--split", "all", "--data", damaged_data(tmp_path / "data", file, old, new)], *words)


@every_door
def test_empty_folders(doors, door, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(door, [*doors[door], "--data", f"marble:{tmp_path / 'empty'}"], tmp_path / "empty")
    refused(door, [*doors[door], "--model", tmp_path / "empty"], tmp_path / "empty")


def change_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **fields}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(31)}, folder / "model.safetensors")


def rename(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.bias"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


@every_door
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: change_config(folder, model_type="llama"), ["config.json", "'llama'", "qwen3"]),
        (lambda folder: change_config(folder, rope_scaling={"factor": 4}), ["rope_scaling"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
        (truncate, ["model.safetensors", "truncated"]),
        (reshape, ["model.safetensors", "model.norm.weight", "[31]", "[32]"]),
        (rename, ["model.norm.weight"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{\n"), ["tokenizer.json"]),
    ],
)
def test_damaged_models(doors, door, model, tmp_path, damage, words):
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    damage(folder)
    argv = [*doors[door], "--model", folder]
    if door == "eval":
        argv = [folder if part == model else part for part in doors[door]]
    if (door, damage) in (("eval", reshape), ("eval", rename)):  # found when the model is loaded, when the run has begun
        code, _, _, err = outcome(evaluate, *argv)
        assert code == 2 and err.count("\n") == 1 and all(word in err for word in words)
    else:
        refused(door, argv, *words)


def write_traces(folder: Path, data: str, model: str, **fields) -> Path:
    run(generate, "--model", model, "--data", data, "--out", folder, "--max-new-tokens", 2, "--limit", 2)
    lines = [json.dumps({**json.loads(line), **fields}) for line in (folder / "traces.jsonl").read_text().splitlines()]
    (folder / "traces.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_traces(model, data, tmp_path):
    argv = ["--model", model, "--out", tmp_path / "out", "--traces"]
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nowhere", tmp_path / "empty"):
        refused("train", [*argv, missing], missing, "holds no traces")
    bad = write_traces(tmp_path / "bad", data, model)
    err = None
    code, _, _, err = outcome(train, *argv, bad)
    assert code == 2 and err.count("\n") == 1 and f"{bad} holds no trace to learn from: kept 0 of 2" in err and not (tmp_path / "out").exists()
    answered = {"answer": ["COOKING"] * 3, "agreement": 1.0, "finish_reason": "stop"}
    other = write_traces(tmp_path / "other", data, model, **answered, template="0", messages=None)
    refused("train", [*argv, other], "traces.jsonl, line 1")
    for probabilities in ([{"COOKING": "1"}] * 3, [1, 2, 3], "abc", [{"COOKING": 1}]):
        guided = write_traces(tmp_path / f"guided {probabilities}", data, model, **answered, probabilities=probabilities)
        refused("train", [*argv, guided], "traces.jsonl, line 1: messages, answer, truth, tokens or probabilities")
    line = json.loads((bad / "traces.jsonl").read_text().splitlines()[0])
    line.pop("truth")
    (bad / "traces.jsonl").write_text(json.dumps(line) + "\n")
    refused("train", [*argv, bad], "traces.jsonl, line 1: the field 'truth' is missing")


def test_traces_without_reasoning_teach_none(model, data, tmp_path):
    turn = {"role": "assistant", "reasoning_content": "", "content": "x"}
    traces = write_traces(tmp_path / "traces", data, model)
    lines = [json.loads(line) for line in (traces / "traces.jsonl").read_text().splitlines()]
    for line in lines:
        line.update(answer=["COOKING"] * 3, agreement=1.0, finish_reason="stop", messages=[*line["messages"][:2], turn])
    (traces / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, _, err = outcome(train, "--model", model, "--out", tmp_path / "out", "--traces", traces, "--validation", 0)
    assert code == 2 and "there is no example to train on (2 without reasoning)" in err and err.count("\n") == 1
    run(train, "--model", model, "--out", tmp_path / "out", "--traces", traces, "--train-on", "answer", "--epochs", 1)


@pytest.mark.parametrize("door", ["generate", "eval"])
def test_adapters(doors, door, model, data, tmp_path):
    from tests.tiny import tiny_model

    adapter = tmp_path / "adapter"
    run(train, *doors["train"], "--out", adapter, "--limit", 1)
    other = tiny_model(tmp_path / "other", seed=5, num_hidden_layers=1)
    argv = [*doors[door], "--adapter", adapter]
    swapped = [other if part == model else part for part in argv]
    code, _, _, err = outcome(DOORS[door], *swapped)
    assert code == 2 and err.count("\n") == 1 and str(adapter) in err and "another base" in err
    notes = json.loads((adapter / "harkd.json").read_text())
    (adapter / "harkd.json").write_text(json.dumps({**notes, "template": "0"}))
    refused(door, [*argv, "--overwrite"], adapter, "template '0'")
    (adapter / "harkd.json").write_text(json.dumps(notes))
    (adapter / "adapter_config.json").unlink()
    refused(door, [*argv, "--overwrite"], adapter, "adapter_config.json")
    refused(door, [*doors[door], "--adapter", model, "--overwrite"], model, "adapter_config.json")


def test_files_of_prompts_and_completions(doors, tmp_path):
    argv = doors["generate"]
    refused("generate", [*argv, "--import-completions", tmp_path / "nothing"], tmp_path / "nothing")
    (tmp_path / "c.jsonl").write_text('{"custom_id": "else#0", "response": {"body": {"choices": [{"message": {"content": "x"}}]}}}\n')
    refused("generate", [*argv, "--import-completions", tmp_path / "c.jsonl"], "c.jsonl answers none of the prompts", "--export-prompts")
    (tmp_path / "c.jsonl").write_text("{\n")
    refused("generate", [*argv, "--import-completions", tmp_path / "c.jsonl"], "c.jsonl, line 1")
    refused("generate", [*argv, "--export-prompts", tmp_path / "c.jsonl/prompts"], "cannot be written")
    refused("generate", [*argv, "--export-prompts", tmp_path / "p", "--import-completions", tmp_path / "c.jsonl"], "give one of them")
    for file in ("--export-prompts", "--import-completions"):
        refused("generate", [*argv, file, tmp_path / "p", "--max-thinking", 0], "--max-thinking is for a model that runs here")
        refused("generate", [*argv, file, tmp_path / "p", "--adapter", tmp_path / "a"], "--adapter is for a model that runs here")


@pytest.mark.parametrize("door", ["generate", "eval"])
def test_a_window_that_does_not_fit_is_told_before_the_folder_is_claimed(doors, door, data, tmp_path):
    refused(door, [*doors[door], "--cache-tokens", 500], "more than the cache holds: raise --cache-tokens (now 512)")
    refused(door, [*doors[door], "--max-new-tokens", 4000], "the model has 4096 positions: lower --max-new-tokens")
    shutil.copytree(data.removeprefix("marble:"), tmp_path / "data")
    environment(tmp_path / "data/A1a/instance3", *(("R7" + "x" * 5000, "ON", 86_400 * 2 + n, "1") for n in range(3)))  # one among good ones
    refused(door, [*doors[door], "--split", "all", "--data", f"marble:{tmp_path / 'data'}"], "A1a/instance3/0000", "4096 positions")
    run(DOORS[door], *doors[door])
