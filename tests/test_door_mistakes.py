"""A user's mistake ends a door with exit code 2 and one line on stderr that names the culprit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harkd.eval import main as evaluate
from harkd.generate import main as generate
from harkd.train import main as train
from tests.door_cases import data, model, outcome, run, short_prompts  # noqa: F401
from tests.helpers import ROOT
from tests.marble_files import environment

DOORS = {"generate": generate, "train": train, "eval": evaluate}


@pytest.fixture
def doors(model, data, tmp_path):
    """The arguments with which each door works."""
    common = ["--model", model, "--data", data, "--out", tmp_path / "out"]
    return {"generate": [*common, "--max-new-tokens", 2], "eval": [*common, "--max-new-tokens", 2], "train": [*common, "--train-on", "truth", "--epochs", 1]}


def refused(door, argv, *words):
    """The door refuses the arguments by naming all `words`, and writes nothing."""
    out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else None
    before = sorted(out.rglob("*")) if out else None
    code, _, stdout, err = outcome(DOORS[door], *argv)
    assert code == 2 and stdout.count("Traceback") == 0, (door, argv, err)
    assert err.count("\n") == 1 and err.startswith(f"harkd.{door}: "), err
    for word in words:
        assert str(word) in err, (word, err)
    assert out is None or sorted(out.rglob("*")) == before
    return err


every_door = pytest.mark.parametrize("door", DOORS)


@every_door
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere/model"], ["'/nowhere/model'", "neither an existing folder nor a hub id"]),
        (["--data", "nosuch:PATH"], ["unknown data 'nosuch:PATH'", "marble:PATH"]),
        (["--data", "marble:/nowhere"], ["there is no folder /nowhere"]),
        (["--split", "holdout"], ["there is no split 'holdout'", "train, validation, test or all"]),
        (["--nonsense", "1"], ["unrecognized arguments: --nonsense"]),
        (["--see", "1"], ["unrecognized arguments: --see"]),  # no abbreviations
        (["--limit", "many"], ["--limit", "'many'"]),
        (["--limit", "0"], ["--limit must be at least 1"]),
        (["--limit", str(10**22)], ["--limit must lie between", str(10**22)]),
        (["--seed", str(10**26)], ["--seed must lie between", "2147483647"]),
        (["--dtype", "int4"], ["--dtype", "'int4'"]),
        (["--device", "abacus"], ["device 'abacus' cannot be used here"]),
        (["--device", "meta"], ["device 'meta' cannot be used here"]),
        (["--transition", "maybe"], ["--transition", "'maybe'"]),
        (["--utc-offset", "99"], ["--utc-offset"]),
    ],
)
def test_flags_of_every_door(doors, door, flags, words):
    refused(door, [*doors[door], *flags], *words)


@pytest.mark.parametrize("door", ["generate", "eval"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], ["temperature", "-1.0"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-p", "0"], ["top-p"]),
        (["--top-k", "-3"], ["top-k", "-3"]),
        (["--max-new-tokens", "0"], ["max-new-tokens"]),
        (["--batch", "0"], ["--batch must be at least 1"]),
        (["--cache-tokens", "0"], ["--cache-tokens must be at least 1"]),
        (["--cache-tokens", str(10**12)], ["--cache-tokens must lie between"]),
        (["--adapter", "/nowhere/adapter"], ["/nowhere/adapter"]),
    ],
)
def test_sampling_flags(doors, door, flags, words):
    refused(door, [*doors[door], *flags], *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min-agreement", "2"], ["--min-agreement", "2.0"]),
        (["--lora-rank", "0"], ["rank", "0"]),
        (["--lora-alpha", "0"], ["--lora-alpha", "0.0"]),
        (["--target-modules", "q_proj,nonsense"], ["nonsense", "k_proj"]),
        (["--target-modules", ""], ["target modules"]),
        (["--epochs", "0"], ["epochs", "0"]),
        (["--lr", "0"], ["lr", "0.0"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--lr", "1e300"], ["lr must be at most 1, not 1e+300"]),
        (["--batch-tokens", "0"], ["batch_tokens"]),
        (["--patience", "-1"], ["--patience", "-1"]),
        (["--validate-f1", "-1"], ["--validate-f1", "-1"]),
        (["--learn", "on-policy=0.5", "--teacher", "x"], ["on-policy takes no weight, --on-policy-fraction"]),
        (["--validation", "1"], ["--validation", "1.0"]),
        (["--keep", "some"], ["--keep", "'some'"]),
        (["--traces", "/nowhere"], ["leave --traces out"]),
        (["--train-on", "reasoning"], ["--traces"]),
        (["--train-on", "answer", "--traces", "/nowhere"], ["leave --data and --limit out"]),
    ],
)
def test_training_flags(doors, flags, words):
    refused("train", [*doors["train"], *flags], *words)


if (ROOT / "harkd/models").is_dir():
    TURNS = {"train": "harkd.generate", "eval": "harkd.train"}
else:
    TURNS = {"generate": "nano-teacher does not ship", "train": "nano-student does not ship", "eval": "harkd.train"}


@pytest.mark.parametrize(("door", "before"), TURNS.items())
def test_a_door_without_arguments_before_its_turn(door, before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(door, [], before)
    done = subprocess.run([sys.executable, "-m", f"harkd.{door}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and before in done.stderr
    assert not list(tmp_path.iterdir())


@every_door
def test_a_hub_id_without_a_network(doors, door, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(door, [*doors[door], "--model", "nobody/no-such-model"], "'nobody/no-such-model'", "hub")


@every_door
def test_out_folders(doors, door, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    refused(door, [*doors[door], "--out", tmp_path / "mine"], tmp_path / "mine", "no run of harkd's")
    refused(door, [*doors[door], "--out", tmp_path / "mine", "--overwrite"], "no run of harkd's")
    refused(door, [*doors[door], "--out", tmp_path / "mine/thesis.txt"], "is a file")
    refused(door, [*doors[door], "--out", tmp_path / "mine/thesis.txt/out"], "thesis.txt", "cannot be written")
    run(DOORS[door], *doors[door], "--limit", 1)
    refused(door, [*doors[door], "--limit", 2], "other settings (limit: 1, now 2)", "--overwrite")
    other = {"generate": "eval", "eval": "train", "train": "generate"}[door]
    refused(other, doors[other], f"another door ({door})")
    (tmp_path / "out/settings.json").write_text("{")
    refused(door, [*doors[door], "--limit", 1], "settings.json cannot be read")


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


@pytest.mark.parametrize("door", ["generate", "eval"])
def test_a_window_that_does_not_fit_is_told_before_the_folder_is_claimed(doors, door, data, tmp_path):
    refused(door, [*doors[door], "--cache-tokens", 500], "more than the cache holds: raise --cache-tokens (now 512)")
    refused(door, [*doors[door], "--max-new-tokens", 4000], "the model has 4096 positions: lower --max-new-tokens")
    shutil.copytree(data.removeprefix("marble:"), tmp_path / "data")
    environment(tmp_path / "data/A1a/instance3", *(("R7" + "x" * 5000, "ON", 86_400 * 2 + n, "1") for n in range(3)))  # one among good ones
    refused(door, [*doors[door], "--split", "all", "--data", f"marble:{tmp_path / 'data'}"], "A1a/instance3/0000", "4096 positions")
    run(DOORS[door], *doors[door])
