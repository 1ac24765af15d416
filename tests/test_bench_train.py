"""tools.bench_train compares like with like: every contestant learns the same, on the same tokens."""

import argparse
import json
import subprocess

import pytest

from tests.tiny import tiny_model
from tools import bench_train
from tools.bench_train import bench_examples, in_flight, main, one


@pytest.mark.slow
def test_contestants_learn_the_same(tmp_path):
    pytest.importorskip("peft")
    folder = tiny_model(tmp_path / "model", std=0.1, num_hidden_layers=1, max_position_embeddings=8192)
    args = argparse.Namespace(data="simulated:D0", windows=4, batch_tokens=4000, parts=2, device="cpu")
    examples = bench_examples(args.data, folder, 4)
    assert {len(example.prefix) for example in examples} == {900} and examples[0].prefix is not None
    assert all(300 <= sum(example.mask) for example in examples)
    found = {name: one(name, folder, args) for name in ("harkd", "alone", "padded", "packed", "limit")}
    for name in ("alone", "padded", "packed"):
        for loss in ("first_loss", "final_loss"):
            assert found[name][loss] == pytest.approx(found["harkd"][loss], rel=1e-4), (name, loss)
    assert found["harkd"]["final_loss"] != pytest.approx(found["harkd"]["first_loss"], rel=1e-4)
    assert 1 < found["harkd"]["examples_per_step"] < 4 and all(row["examples_per_s"] > 0 for row in found.values())
    held = {name: row["tokens_in_flight"] for name, row in found.items()}
    assert held["limit"] == held["harkd"] < 4000 < held["alone"] and held["packed"] <= held["padded"] < held["alone"]
    assert in_flight("packed", examples, 4) == max(len(e.prefix) + len(e.ids) for e in examples) == in_flight("padded", examples, 4)


@pytest.mark.parametrize("loss", [2.0, 2.1])
def test_losses_that_differ_are_told_and_liger_runs_on_a_gpu_alone(monkeypatch, capsys, loss):
    """With the contestants' processes played."""
    speeds = {"harkd": 12.0, "alone": 8.0, "padded": 2.0, "packed": 3.0, "padded-liger": 4.0, "packed-liger": 1.0, "limit": 24.0}

    def run(command, **_):
        name = command[command.index("--one") + 1]
        row = {"examples_per_s": speeds[name], "net_peak_bytes": 5 if name == "harkd" else 10, "final_loss": loss if name == "padded" else 2.0}
        row["tokens_in_flight"] = 20 if name == "harkd" else 10
        return subprocess.CompletedProcess(command, 0, json.dumps(row))

    monkeypatch.setattr(bench_train, "make_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(bench_train.subprocess, "run", run)
    monkeypatch.setattr(bench_train, "find_spec", lambda name: name == "liger_kernel")
    for device, best in (("cpu", 3.0), ("cuda", 4.0)):
        assert main(["--device", device]) == (loss != 2.0)
        out, err = capsys.readouterr()
        ratios = json.loads(out.splitlines()[-1])["ratios"]
        assert ratios == {"examples_to_peft": 12 / best, "memory_to_peft": 0.25, "shared_prefix_gain": 1.5, "to_limit": 0.5, "loss_to_peft": round(2 / loss, 3)}
        assert ("final losses differ" in err) == (loss != 2.0) and ("packed-liger" in out) == (device == "cuda")


def test_a_contestant_that_fails_leaves_the_others(monkeypatch, capsys):
    failing = ["padded"]

    def run(command, **_):
        name = command[command.index("--one") + 1]
        row = {"examples_per_s": 6.0 if name == "harkd" else 2.0, "net_peak_bytes": 5, "final_loss": 2.0, "tokens_in_flight": 10}
        return subprocess.CompletedProcess(command, int(name in failing), json.dumps(row))

    monkeypatch.setattr(bench_train, "make_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(bench_train.subprocess, "run", run)
    assert main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "padded    failed, exit code 1" in out and json.loads(out.splitlines()[-1])["ratios"]["examples_to_peft"] == 3.0
    failing.append("packed")
    assert main(["--device", "cpu"]) == 1 and "no ratios" in capsys.readouterr().err
