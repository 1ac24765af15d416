"""What the tests of the training loop share: a run of a tiny model, what it wrote, and what becomes of it after a best checkpoint."""

import pytest
import torch

from harkd.distill import checkpoint
from harkd.distill.loop import LoopSettings, train
from harkd.jsonl import read_json_lines
from tests.distill_cases import make_examples, make_model

TRAIN = make_examples(12)
VALIDATION = TRAIN[:2] + make_examples(3, seed=8)  # learnable in part, so that the loss falls first and rises later

SETTINGS = LoopSettings(lr=2e-2, epochs=4, batch_tokens=25, packs_per_step=2, seed=5, save_every=2, eval_every=2)


def run(folder, settings=SETTINGS, validation=VALIDATION, model=None, **callbacks):
    """Train a fresh tiny model. Returns the result and the values of its parameters."""
    model, parameters = model or make_model(torch.float32)
    result = train(model, parameters, TRAIN, validation, settings, folder, **callbacks)
    return result, {name: parameter.detach().clone() for name, parameter in parameters.items()}


def metrics(folder):
    machine = {"seconds", "tokens_per_second", "memory_bytes"}
    return [{key: value for key, value in record.items() if key not in machine} for _, record in read_json_lines(folder / "metrics.jsonl")]


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: folder, result, parameters."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def after_best(monkeypatch, call):
    """Let `call(facts)` follow whenever the best checkpoint has been written."""
    save = checkpoint.save

    def saved(folder, name, parameters, optimiser, facts):
        save(folder, name, parameters, optimiser, facts)
        if name == "best":
            call(facts)

    monkeypatch.setattr(checkpoint, "save", saved)
