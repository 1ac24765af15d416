"""Two processes train as one: the same steps in float64, checkpoints that go over from one to two and back, and a lost process is told."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harkd.distill import checkpoint
from harkd.distributed import join
from harkd.distill.losses import Objective
from harkd.distill.loop import LoopSettings, epoch_steps, train
from harkd.errors import UserError
from harkd.jsonl import read_json_lines
from tests.distill_cases import VOCAB, make_examples, make_model, make_teacher, with_choices
from tests.helpers import ROOT

LEARN = with_choices(make_examples(11), seed=2)
LEARN = [replace(example, choices=()) if i % 4 else example for i, example in enumerate(LEARN)]  # counts differ from rank to rank
SETTINGS = LoopSettings(lr=2e-2, epochs=3, batch_tokens=25, packs_per_step=2, seed=5, save_every=2)
OBJECTIVE = Objective((("sequence", 1.0), ("labels", 0.5), ("logits", 0.5)), on_policy_fraction=0.3, divergence="jsd")


def rollout(examples, seed):
    """Other tokens, which do not depend on the process: random ones are drawn by each on its own. A model is not asked for nothing."""
    assert examples
    return [replace(example, ids=[(7 * token + 3) % VOCAB for token in example.ids], choices=()) for example in examples]


def go(folder, pause=0.0, log=lambda record: None):
    """Train in float64 in as many processes as there are."""

    def wait(record):
        time.sleep(pause)
        log(record)

    with join("cpu") as world:
        model, parameters = make_model()
        how = {"objective": replace(OBJECTIVE, teacher=make_teacher()), "world": world, "rollout": rollout, "log": wait}
        result = train(model, parameters, LEARN, LEARN[:4], SETTINGS, Path(folder), **how)
        return result, {name: parameter.detach().clone() for name, parameter in parameters.items()}


def start(folder, pause=0.0):
    """Two processes; their ends of the pipes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.test_distributed import go; print(sum(p.sum().item() for p in go(sys.argv[1], float(sys.argv[2]))[1].values()))"
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [sys.executable, "-c", code, str(folder), str(pause)]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(argv, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in range(2)]


def end(processes):
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    return [float(out.splitlines()[-1]) for out, _ in found]


def losses(folder):
    return [{key: record[key] for key in ("step", "loss", "grad_norm", "tokens", "supervised", "ways")} for _, record in read_json_lines(folder / "metrics.jsonl") if "lr" in record]


def assert_same(folder, whole):
    for name in ("last", "best"):
        found, expected = (checkpoint.load(place, name) for place in (folder, whole))
        for key, tensor in expected.tensors.items():
            torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-10, atol=1e-12)
    for found, expected in zip(losses(folder), losses(whole), strict=True):
        ways, expected_ways = found.pop("ways"), expected.pop("ways")
        for mine, theirs in ((found, expected), (ways, expected_ways)):
            assert mine.keys() == theirs.keys() and all(abs(mine[key] - theirs[key]) <= 1e-10 * abs(theirs[key]) for key in mine)


class Interrupted(Exception):
    pass


def test_two_processes_train_as_one(tmp_path):
    """From the start until one of them is lost, which the other tells, and one process goes on; and from the checkpoint of one process."""
    steps = [packs for epoch in range(3) for packs in epoch_steps(LEARN, SETTINGS, epoch)]
    assert any(len(packs) == 1 for packs in steps) and any(len(packs) == 2 for packs in steps)  # a process may have no pack
    result, parameters = go(tmp_path / "one")
    assert {way for record in losses(tmp_path / "one") for way in record["ways"]} == {"sequence", "labels", "logits", "on-policy"}

    first, second = start(tmp_path / "part", pause=0.1)
    deadline = time.monotonic() + 120
    while not (tmp_path / "part/previous.safetensors").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert first.returncode and time.monotonic() - began < 60
    assert "UserError: another process of this run was lost" in err and "goes on from what is on the disk" in err
    second.communicate()
    assert 0 < checkpoint.load(tmp_path / "part", "last").facts["step"] < result.step
    found, _ = go(tmp_path / "part")
    assert (found.step, found.best_step) == (result.step, result.best_step)
    assert_same(tmp_path / "part", tmp_path / "one")

    def interrupt(record):
        if record["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        go(tmp_path / "two", log=interrupt)
    sums = end(start(tmp_path / "two"))
    assert sums[0] == sums[1] and abs(sums[0] - sum(p.sum().item() for p in parameters.values())) < 1e-9  # the same bits in both
    assert_same(tmp_path / "two", tmp_path / "one")


def test_the_others_wait_while_the_first_works_alone(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **how: asked.update(how))
    for name, value in (("get_rank", 0), ("get_world_size", 2), ("destroy_process_group", None)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    with join("cpu"):
        assert asked["timeout"].total_seconds() >= 3600


def test_processes_that_differ_are_told(tmp_path, monkeypatch):
    """The sum over processes is what tells: here one that differs from this one's double."""
    from harkd.distributed import World

    monkeypatch.setattr(World, "sum", lambda self, values: [2 * value + 1 for value in values])
    model, parameters = make_model()
    with pytest.raises(UserError, match="the processes of this run differ"):
        train(model, parameters, LEARN, [], SETTINGS, tmp_path, world=World(0, 2))
