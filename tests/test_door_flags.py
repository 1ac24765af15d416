"""A user's mistake in flags and folders ends a door with exit code 2 and one line on stderr that names the culprit."""

import subprocess
import sys

import pytest

from tests.door_cases import data, model, run, short_prompts  # noqa: F401
from tests.mistake_cases import DOORS, doors, every_door, refused  # noqa: F401


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
        (["--traces", "/nowhere"], ["--traces is for --train-on reasoning and answer: leave it out"]),
        (["--train-on", "reasoning"], ["--traces"]),
        (["--train-on", "answer", "--traces", "/nowhere"], ["--data is for --train-on truth", "leave it out"]),
        (["--learn", "on-policy", "--teacher", "x", "--on-policy-fraction", "0"], ["--on-policy-fraction", "above 0", "0.0"]),
        (["--learn", "on-policy", "--teacher", "x", "--on-policy-fraction", "nan"], ["--on-policy-fraction", "above 0", "nan"]),
        (["--learn", "on-policy"], ["--learn on-policy asks a teacher"]),
    ],
)
def test_training_flags(doors, flags, words):
    refused("train", [*doors["train"], *flags], *words)


LOGITS = ["--learn", "logits", "--teacher", "x"]


@pytest.mark.parametrize(
    ("flags", "name", "place"),
    [
        (["--keep", "best"], "--keep", "reasoning and answer"), (["--cap", "3"], "--cap", "reasoning and answer"),
        (["--divergence", "jsd"], "--divergence", "--learn logits"), (["--teacher-temperature", "2"], "--teacher-temperature", "--learn logits"),
        (["--beta", "0.1", *LOGITS], "--beta", "--divergence jsd"), (["--teacher", "x"], "--teacher", "--learn logits and on-policy"),
        (["--on-policy-fraction", "0.2", *LOGITS], "--on-policy-fraction", "--learn on-policy"),
        (["--max-new-tokens", "9"], "--max-new-tokens", "--validate-f1"), (["--teacher-top-k", "9"], "--teacher-top-k", "--learn logits without on-policy"),
        (["--patience", "2", "--validation", "0"], "--patience", "--validation above 0"),
    ],
)  # fmt: skip
def test_training_flags_that_would_change_nothing(doors, flags, name, place):
    err = refused("train", [*doors["train"], *flags])
    assert err.startswith(f"harkd.train: {name} is for ") and err.endswith(f"{place}: leave it out\n")


@pytest.mark.parametrize(
    ("flags", "name"),
    [(["--split", "all"], "--split"), (["--no-rules"], "--rules"), (["--noise", "drop=0.1"], "--noise"), (["--folds", "3"], "--folds"),
     (["--limit", "2"], "--limit"), (["--keep", "all", "--min-agreement", "0.5"], "--min-agreement")],
)  # fmt: skip
def test_flags_that_would_change_nothing_with_traces(model, tmp_path, flags, name):
    assert f": {name} is for " in refused("train", ["--model", model, "--out", tmp_path / "out", "--traces", "/nowhere", *flags])


@pytest.mark.parametrize(("door", "before"), [("train", "harkd.generate"), ("eval", "harkd.train")])
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
