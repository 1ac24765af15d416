"""The training loop: it learns, and continues from a kill with the same bits."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from random import Random

import pytest
import torch

from harkd.distill import checkpoint
from harkd.distill.loop import LoopSettings, epoch_steps, train
from harkd.distill.losses import Objective, validation_loss
from harkd.distill.optimiser import learning_rate
from harkd.errors import UserError
from harkd.jsonl import read_json_lines
from tests.distill_cases import make_model, make_teacher, with_choices, write
from tests.helpers import ROOT
from tests.loop_cases import SETTINGS, TRAIN, VALIDATION, after_best, metrics, run, same, whole  # noqa: F401


def test_the_metrics_tell_every_step_and_validation(whole):
    folder, result, _ = whole
    schedule = [(epoch, packs) for epoch in range(SETTINGS.epochs) for packs in epoch_steps(TRAIN, SETTINGS, epoch)]
    steps = [record for record in metrics(folder) if "lr" in record]
    assert [(record["step"], record["epoch"]) for record in steps] == [(i + 1, epoch) for i, (epoch, _) in enumerate(schedule)]
    assert result.step == len(schedule) > 6 and schedule[0][1] != epoch_steps(TRAIN, SETTINGS, 1)[0]
    for i, ((_, packs), record) in enumerate(zip(schedule, steps, strict=True)):
        examples = [TRAIN[index] for pack in packs for index in pack]
        assert record["supervised"] == sum(sum(example.mask) for example in examples)
        assert record["tokens"] <= 2 * SETTINGS.batch_tokens and record["grad_norm"] > 0
        assert record["lr"] == learning_rate(i, len(schedule), SETTINGS.lr, SETTINGS.warmup_fraction)
    validated = [record["step"] for record in metrics(folder) if "validation_loss" in record]
    ends = [i + 1 for i, (epoch, _) in enumerate(schedule) if i + 1 == len(schedule) or schedule[i + 1][0] > epoch]
    assert validated == sorted({0, *ends, *range(2, len(schedule) + 1, 2)})


def test_the_first_step_is_the_clipped_update_of_the_mean_loss(tmp_path):
    """Against torch's own optimiser and clipping, on the loss by the model's plain logits."""
    settings = LoopSettings(lr=1e-2, epochs=1, batch_tokens=1000, warmup_fraction=0, clip=0.1)
    _, trained = run(tmp_path, settings, [], make_model(torch.float64))
    model, parameters = make_model(torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for example in TRAIN:
        ids = example.prefix + example.ids
        log_p = model.logits(ids).log_softmax(-1)
        first = len(example.prefix)
        loss = loss - sum(log_p[first + t - 1, ids[first + t]] for t, learnt in enumerate(example.mask) if learnt)
    (loss / sum(sum(example.mask) for example in TRAIN)).backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1)
    torch.optim.AdamW(parameters.values(), lr=learning_rate(0, 1, 1e-2, 0), weight_decay=0).step()
    for name in parameters:
        torch.testing.assert_close(trained[name], parameters[name].detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns_with_an_adapter_and_as_a_whole_model_in_bfloat16(tmp_path, lora):
    settings = LoopSettings(lr=3e-2, epochs=12, batch_tokens=200, weight_decay=0.0 if lora else 0.01)
    model, parameters = make_model(torch.bfloat16, lora=lora)
    before = validation_loss(model, TRAIN, 200)
    result, _ = run(tmp_path, settings, [], (model, parameters))
    assert validation_loss(model, TRAIN, 200) < 0.7 * before
    assert result.best_loss is None and result.best_step == result.step
    assert all(parameter.dtype == (torch.float32 if lora else torch.bfloat16) for parameter in parameters.values())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 6, 8, 11, "best 1", "best 3"])
def test_interrupted_and_continued_equals_uninterrupted_to_the_bit(whole, tmp_path, monkeypatch, moment):
    folder, result, parameters = whole
    calls = {"log": 0, "best": 0}

    def interrupt(kind):
        calls[kind] += 1
        if moment in (calls["log"] - 1 if kind == "log" else None, f"{kind} {calls[kind]}"):
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_best(patch, lambda facts: interrupt("best"))
        run(tmp_path, log=lambda record: interrupt("log"))
    found_result, found = run(tmp_path)
    assert found_result == result and same(found, parameters)
    assert metrics(tmp_path) == metrics(folder)
    last, expected = (checkpoint.load(place, "last") for place in (tmp_path, folder))
    assert same(last.tensors, expected.tensors) and last.facts == expected.facts


CHILD = """
import sys, time
from pathlib import Path
from tests.loop_cases import run
run(Path(sys.argv[1]), log=lambda record: time.sleep(0.05))
"""

def lines_so_far(folder):
    return len((folder / "metrics.jsonl").read_bytes().splitlines()) if (folder / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued_equals_uninterrupted_to_the_bit(whole, tmp_path, moments):
    """Each child is killed a random time after it wrote something, in the middle of whatever it does then, at whatever step."""
    folder, result, parameters = whole
    draw, killed = Random(moments), 0
    while killed < moments:
        place = tmp_path / str(killed // 3)  # a run is killed three times, then continued to its end
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(place)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        wanted, deadline = draw.randint(1, 5 + 5 * (killed % 3)), time.monotonic() + 120
        while lines_so_far(place) < wanted:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        killed += 1
    for place in sorted(tmp_path.iterdir()):
        found_result, found = run(place)
        assert found_result == result and same(found, parameters) and metrics(place) == metrics(folder)


def test_every_way_to_learn_continues_to_the_bit(tmp_path):
    """Labels, a teacher's logits and text of the student's own: the same again, and the metrics tell which step learnt what."""
    learn, teacher = with_choices(TRAIN), make_teacher(torch.float32)
    ways = (("sequence", 1.0), ("labels", 0.5), ("logits", 0.5))
    objective = Objective(ways, on_policy_fraction=0.4, divergence="jsd", teacher=teacher)

    def go(folder, log=lambda record: None):
        model, parameters = make_model(torch.float32)
        rollout = lambda examples, seed: write(model, examples, seed)  # noqa: E731
        result = train(model, parameters, learn, VALIDATION, SETTINGS, folder, objective=objective, rollout=rollout, log=log)
        return result, parameters

    def interrupt(record):
        if record["step"] in moments:
            moments.remove(record["step"])
            raise Interrupted

    expected, expected_parameters = go(tmp_path / "whole")
    moments = {1, 4, 9}
    while moments:
        with pytest.raises(Interrupted):
            go(tmp_path / "part", interrupt)
    result, parameters = go(tmp_path / "part")
    assert result == expected and same(parameters, expected_parameters) and metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    steps = [record for record in metrics(tmp_path / "whole") if "lr" in record]
    on_policy = [record["step"] - 1 for record in steps if set(record["ways"]) == {"on-policy"}]
    assert on_policy == [step for step in range(len(steps)) if objective.is_on_policy(step, SETTINGS.seed)] != []
    assert all(set(record["ways"]) in ({"on-policy"}, {"sequence", "labels", "logits"}) for record in steps)
    for change in ({"beta": 0.4}, {"ways": ways[:2]}, {"on_policy_fraction": 0.5}, {"teacher": make_teacher(torch.float32, seed=3)}):
        model, parameters = make_model(torch.float32)
        with pytest.raises(UserError, match="other settings"):
            train(model, parameters, learn, VALIDATION, SETTINGS, tmp_path / "part", objective=replace(objective, **change))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, damage, capsys):
    folder, result, parameters = whole

    def stop(record):
        if record["step"] == 5 and "lr" in record:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path, log=stop)
    last = tmp_path / "last.safetensors"
    good = last.read_bytes()
    assert [checkpoint.load(tmp_path, name).facts["step"] for name in ("previous", "last")] == [3, 4]
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(good[: len(good) // 2] if damage == "truncated" else good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    found_result, found = run(tmp_path)
    assert found_result == result and same(found, parameters) and metrics(tmp_path) == metrics(folder)
    told = capsys.readouterr().err
    assert damage == "gone" or (f"{last} is damaged" in told and f"going on from {tmp_path / 'previous.safetensors'}" in told)


def test_two_damaged_checkpoints_are_told(whole, tmp_path):
    for name in ("last", "previous"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="previous.safetensors is damaged"):
        run(tmp_path)
    (tmp_path / "previous.safetensors").unlink()
    with pytest.raises(UserError, match="last.safetensors is damaged .*: remove it to train from the start"):
        run(tmp_path)


def test_a_finished_run_is_not_trained_again(whole):
    folder, result, parameters = whole
    before = (folder / "metrics.jsonl").read_bytes()
    found_result, found = run(folder, log=lambda record: pytest.fail("nothing is left to do"))
    assert found_result == result and same(found, parameters)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_seed_gives_another_run(whole, tmp_path):
    _, _, parameters = whole
    assert not same(run(tmp_path, replace(SETTINGS, seed=6))[1], parameters)


def test_a_checkpoint_of_another_run_is_refused(whole):
    folder = whole[0]
    message = "last.safetensors belongs to a run with other settings or other examples"
    with pytest.raises(UserError, match=message):
        run(folder, replace(SETTINGS, lr=3e-2))
    with pytest.raises(UserError, match=message):
        run(folder, validation=VALIDATION[1:])
    with pytest.raises(UserError, match=message):
        run(folder, validation=[replace(VALIDATION[0], ids=VALIDATION[0].ids[::-1]), *VALIDATION[1:]])


def test_the_metrics_tell_speed_and_memory(whole):
    steps = [record for _, record in read_json_lines(whole[0] / "metrics.jsonl") if "lr" in record]
    assert all(record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"]) for record in steps)
    assert all(record["memory_bytes"] > 1 << 20 for record in steps)
