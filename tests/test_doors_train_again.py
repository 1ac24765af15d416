"""python -m harkd.train, a second time: continued, done, changed, or refused at no cost to the run before."""

import shutil
import signal

import pytest

from harkd.doors import enter
from harkd.eval import main as evaluate
from harkd.generate import main as generate
from harkd.train import main
from tests.door_cases import child, content, kill, mixed, model, one_thread, outcome, run, short_prompts  # noqa: F401
from tests.train_cases import losses, traces, truth  # noqa: F401


def test_killed_and_continued_it_ends_with_the_same_bytes(truth, one_thread, tmp_path):
    truth = [*truth, "--epochs", 30, "--limit", 6, "--lora-rank", 2]
    whole = run(main, *truth, "--out", tmp_path / "whole")
    out, codes = tmp_path / "killed", []
    for steps in (1, 25):
        code, _, _ = kill(child("train", *truth, "--out", out), lambda: (out / "metrics.jsonl").exists() and len(losses_so_far(out)) >= steps)
        codes.append(code)
    assert codes[0] == -signal.SIGKILL and not (out / "result.json").exists()
    code, result, _, _ = outcome(main, *truth, "--out", out)
    assert code == 0 and {**result, "out": ""} == {**whole, "out": ""}
    assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole/adapter_model.safetensors").read_bytes()
    assert losses(out) == losses(tmp_path / "whole")


def losses_so_far(out):
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]


def test_again_it_is_done(truth, tmp_path):
    first = run(main, *truth, "--epochs", 1, "--limit", 2)
    before = content(tmp_path / "out")
    code, result, _, err = outcome(main, *truth, "--epochs", 1, "--limit", 2)
    assert code == 0 and result == first and "is done" in err and content(tmp_path / "out") == before
    code, _, _, err = outcome(main, *truth, "--epochs", 2, "--limit", 2)
    assert code == 2 and "epochs: 1, now 2" in err and content(tmp_path / "out") == before
    assert outcome(main, *truth, "--epochs", 2, "--overwrite", "--data", "marble:/nowhere")[0] == 2 and content(tmp_path / "out") == before
    assert run(main, *truth, "--epochs", 2, "--limit", 2, "--overwrite")["step"] == 2


def copied(data, folder):
    shutil.copytree(data.removeprefix("marble:"), folder)
    return f"marble:{folder}"


@pytest.mark.parametrize("door", ["train", "eval", "generate"])
def test_data_that_changed_are_other_settings(model, mixed, tmp_path, door):
    mixed = copied(mixed, tmp_path / "data")
    argv = ["--model", model, "--data", mixed, "--limit", 1, *(["--train-on", "truth", "--epochs", 1] if door == "train" else ["--max-new-tokens", 2])]
    door = {"train": main, "eval": evaluate, "generate": generate}[door]
    first = run(door, *argv, "--out", tmp_path / "data/runs/out")
    (tmp_path / "data/.hidden").write_text("x")
    assert run(door, *argv, "--out", tmp_path / "data/runs/out") == first  # nor does the run in it make it another one
    path = tmp_path / "data/A1a/instance8/environmental.csv"
    path.write_bytes(path.read_bytes().replace(b"R7", b"E2"))
    code, _, _, err = outcome(door, *argv, "--out", tmp_path / "data/runs/out")
    assert code == 2 and f"other settings (inputs.{mixed}: " in err and err.count("\n") == 1


def test_started_again_by_torchrun_it_goes_on(truth, tmp_path, monkeypatch):
    truth = [*truth, "--epochs", 1, "--limit", 2]
    run(main, *truth)
    before = content(tmp_path / "out")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "is done" in outcome(main, *truth, "--overwrite")[3] and content(tmp_path / "out") == before


def test_interrupted_it_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    for argv, words in (([], "the same command goes on"), (["--overwrite"], "the same command without --overwrite goes on")):
        assert enter("harkd.train", interrupted, argv) == 130 and words in capsys.readouterr().err


def test_what_cannot_be_trained_costs_no_older_run(truth, model, mixed, tmp_path):
    from tests.tiny import tiny_model

    run(main, *truth, "--epochs", 1, "--limit", 2)
    before = content(tmp_path / "out")
    few = tiny_model(tmp_path / "few", num_hidden_layers=1, max_position_embeddings=400)
    small = tiny_model(tmp_path / "small", num_hidden_layers=1, vocab_size=300)
    for flags, words in (
        (["--batch-tokens", 400], "raise --batch-tokens (now 400)"), (["--dtype", "float16"], "float16 cannot hold gradients"),
        (["--device", "nonsense"], "the device 'nonsense' cannot be used here"), (["--model", few], "and the model 400 positions"),
        (["--model", small], "they do not belong together"),
    ):  # fmt: skip
        code, _, _, err = outcome(main, *truth, *flags, "--overwrite")
        assert code == 2 and words in err and content(tmp_path / "out") == before


def test_traces_that_changed_are_other_settings(model, traces, tmp_path):
    copy = tmp_path / "traces"
    copy.mkdir()
    for name in ("traces.jsonl", "prompts.jsonl"):
        (copy / name).write_bytes((traces / name).read_bytes())
    argv = ["--model", model, "--traces", copy, "--train-on", "answer", "--epochs", 1, "--out", tmp_path / "out"]
    run(main, *argv)
    kept = (copy / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "traces.jsonl").write_bytes(b"".join(kept[:-3]))
    code, _, _, err = outcome(main, *argv)
    assert code == 2 and "traces.jsonl: " in err and "--overwrite" in err
