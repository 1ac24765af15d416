"""tools.bench_train compares like with like: every contestant learns the same, on the same tokens."""

import argparse

import pytest

from tests.tiny import tiny_model
from tools.bench_train import bench_examples, one


@pytest.mark.slow
def test_contestants_learn_the_same(tmp_path):
    pytest.importorskip("peft")
    folder = tiny_model(tmp_path / "model", std=0.1, num_hidden_layers=1, max_position_embeddings=8192)
    args = argparse.Namespace(data="simulated:D0", windows=4, batch_tokens=4000, device="cpu")
    examples = bench_examples(args.data, folder, 4)
    assert {len(example.prefix) for example in examples} == {900} and examples[0].prefix is not None
    assert all(300 <= sum(example.mask) for example in examples)
    found = {name: one(name, folder, args) for name in ("harkd", "alone", "padded", "packed", "limit")}
    for name in ("alone", "padded", "packed"):
        for loss in ("first_loss", "final_loss"):
            assert found[name][loss] == pytest.approx(found["harkd"][loss], rel=1e-4), (name, loss)
    assert found["harkd"]["final_loss"] != pytest.approx(found["harkd"]["first_loss"], rel=1e-4)
    assert 1 < found["harkd"]["examples_per_step"] < 4 and all(row["examples_per_s"] > 0 for row in found.values())
