"""What the training loop keeps and hands back, and when it stops."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from harkd.distill import checkpoint
from harkd.distill.loop import LoopSettings, epoch_steps, train
from harkd.distill.losses import validation_loss
from harkd.errors import UserError
from tests.distill_cases import make_model
from tests.loop_cases import SETTINGS, TRAIN, VALIDATION, after_best, metrics, run, same, whole  # noqa: F401


def test_the_best_by_validation_is_kept_and_handed_back(tmp_path, monkeypatch):
    """The validation loss rises again in the middle of this run, which ends with the parameters of the lowest."""
    model, parameters = make_model(torch.float32)
    seen = []

    def look(best):
        seen.append((best, validation_loss(model, VALIDATION, 25)))

    after_best(monkeypatch, look)
    result, _ = run(tmp_path, SETTINGS, VALIDATION, (model, parameters))
    losses = {record["step"]: record["validation_loss"] for record in metrics(tmp_path) if "validation_loss" in record}
    assert result.start_loss == losses.pop(0)
    assert result.best_loss == min(losses.values()) == losses[result.best_step] and result.best_step < result.step
    assert validation_loss(model, VALIDATION, 25) == result.best_loss
    assert [best["best_loss"] for best, _ in seen] == [loss for _, loss in seen]  # with the best in place
    assert seen[-1][0]["best_step"] == result.best_step


def test_the_best_by_f1_is_kept_beside_the_best_by_loss_and_is_the_result(tmp_path):
    model, parameters = make_model(torch.float32)
    scores, at, told = [0.2, 0.9, 0.5, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], {}, []

    def f1():
        at[len(told)] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        told.append(scores[len(told)])
        return told[-1]

    result = train(model, parameters, TRAIN, VALIDATION, replace(SETTINGS, f1_every=3), tmp_path, f1=f1)
    steps = [record["step"] for record in metrics(tmp_path) if "validation_f1" in record]
    assert (result.best_f1, result.best_f1_step) == (0.9, steps[1]) and same(parameters, at[1])  # the first of equals
    assert checkpoint.load(tmp_path, "best").facts["best_step"] == result.best_step != result.best_f1_step
    assert {step for step in steps if step % 3} <= {record["step"] for record in metrics(tmp_path) if "validation_loss" in record}
    assert run(tmp_path / "other")[0].best_loss == result.best_loss  # validation by F1 changes nothing else


def test_patience_stops_a_run_that_gets_no_better_and_it_stays_stopped(whole, tmp_path):
    patient = replace(SETTINGS, patience=2, epochs=8)
    result, parameters = run(tmp_path, patient)
    losses = [(record["step"], record["validation_loss"]) for record in metrics(tmp_path) if "validation_loss" in record][1:]
    after = [loss for step, loss in losses if step > result.best_step]
    assert len(after) == result.waited == 2 and min(after) >= result.best_loss and result.step == losses[-1][0]
    assert result.step < sum(len(epoch_steps(TRAIN, patient, epoch)) for epoch in range(8))
    again, found = run(tmp_path, patient, log=lambda record: pytest.fail("nothing is left to do"))
    assert again == result and same(found, parameters)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    model, parameters = make_model(torch.float32)

    def break_it(record):
        if record["step"] == 5 and "lr" in record:
            with torch.no_grad():
                list(parameters.values())[-1].fill_(float("nan"))

    with pytest.raises(UserError) as error:
        run(tmp_path, replace(SETTINGS, eval_every=0), VALIDATION, (model, parameters), log=break_it)
    schedule = [packs for epoch in range(SETTINGS.epochs) for packs in epoch_steps(TRAIN, SETTINGS, epoch)]
    windows = [TRAIN[i].window for pack in schedule[5] for i in pack]
    assert "diverged: in step 6 the loss was nan" in str(error.value) and str(tmp_path) in str(error.value)
    assert all(window in str(error.value) for window in windows)
    last = checkpoint.load(tmp_path, "last")
    assert last.facts["step"] == 4 and all(tensor.isfinite().all() for tensor in last.tensors.values())
    assert not any("NaN" in json.dumps(record) for record in metrics(tmp_path))


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    model, parameters = make_model(torch.float32)

    def break_it(record):
        if record["step"] == 3 and "lr" in record:
            with torch.no_grad():
                model.head_weight.mul_(200)

    with pytest.raises(UserError, match=r"diverged: in step 4 the loss was [0-9]{2,}\.") as error:
        run(tmp_path, replace(SETTINGS, eval_every=0), [], (model, parameters), log=break_it)
    assert "home" in str(error.value) and checkpoint.load(tmp_path, "last").facts["step"] == 3


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path):
    model, parameters = make_model(torch.float32)
    with torch.no_grad():
        list(parameters.values())[-1].fill_(float("inf"))
    with pytest.raises(UserError, match="after step 0 the validation loss was nan"):
        run(tmp_path, SETTINGS, VALIDATION, (model, parameters))


def test_nothing_to_train_on_is_told(tmp_path):
    with pytest.raises(UserError, match="no example to train on"):
        train(*make_model(), [], VALIDATION, SETTINGS, tmp_path)


def test_a_lost_best_checkpoint_is_told(whole, tmp_path):
    (tmp_path / "last.safetensors").write_bytes((whole[0] / "last.safetensors").read_bytes())
    with pytest.raises(UserError, match="lost its best checkpoint"):
        run(tmp_path)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"epochs": 0}, {"clip": float("nan")}, {"batch_tokens": -1}, {"warmup_fraction": 1.5}])
def test_settings_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name} must be"):
        LoopSettings(**{**asdict(SETTINGS), **wrong})
