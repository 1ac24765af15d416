"""Checkpoints come back to the bit, are whole or absent, and tell when they are damaged."""

import json
import shutil

import pytest
import torch
from torch import nn

from harkd.distill import checkpoint
from harkd.distill.optimiser import AdamW
from harkd.errors import UserError

FACTS = {"step": 12, "epoch": 1, "best_loss": 0.1 + 0.2, "run": "abc"}


def make(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "b": (5,)}
    named = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}
    optimiser = AdamW(named)
    for _ in range(3):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimiser.step(1e-3)
    return named, optimiser


@pytest.fixture
def stored(tmp_path):
    named, optimiser = make(1)
    path = checkpoint.save(tmp_path, "last", named, optimiser, FACTS)
    return path, named, optimiser


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_comes_back_to_the_bit(tmp_path, dtype):
    named, optimiser = make(1, dtype)
    checkpoint.save(tmp_path, "last", named, optimiser, FACTS)
    found = checkpoint.load(tmp_path, "last")
    others, other = make(2, dtype)
    assert not torch.equal(others["b"], named["b"])
    found.restore(others, other)
    assert found.facts == FACTS and other.steps == 3
    assert all(torch.equal(others[name], named[name]) and others[name].dtype == dtype for name in named)
    expected, state = optimiser.state_dict(), other.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    assert ("master/b" in state) == (dtype == torch.bfloat16)


def test_there_may_be_none(tmp_path):
    assert checkpoint.load(tmp_path, "last") is None


def test_a_write_that_fails_leaves_the_one_before(stored, monkeypatch):
    path, _, _ = stored
    before = path.read_bytes()

    def half(tensors, file, metadata):
        with open(file, "wb") as out:
            out.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("harkd.tensors.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path.parent, "last", *make(2), FACTS)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_damage_anywhere_is_told(stored):
    """Truncated or with one bit flipped, at places all over the file: never read as good, always named."""
    path, _, _ = stored
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(0, 8), *range(8, header, 3), *range(header, len(good), 17), len(good) - 1]
    for place in places:
        flipped = bytearray(good)
        flipped[place] ^= 4
        for damaged in (good[:place], bytes(flipped)):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="last.safetensors is damaged"):
                checkpoint.load(path.parent, "last")
    path.write_bytes(good)
    assert checkpoint.load(path.parent, "last").facts == FACTS


def test_a_file_of_another_kind_is_damaged_too(stored):
    from safetensors.torch import save_file

    path, _, _ = stored
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="last.safetensors is damaged"):
        checkpoint.load(path.parent, "last")


@pytest.mark.parametrize("change", [{"b": None}, {"b": 6}, {"c": 2}])
def test_another_model_is_told(stored, change):
    path, _, _ = stored
    named, _ = make(2)
    for name, size in change.items():
        named.pop(name, None)
        if size:
            named[name] = nn.Parameter(torch.zeros(size))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for optimiser in (AdamW(named), None):
        with pytest.raises(UserError, match="last.safetensors belongs to another model"):
            checkpoint.load(path.parent, "last").restore(named, optimiser)
    assert all(torch.equal(named[name], before[name]) for name in named)


def test_the_facts_can_be_read_by_any_safetensors_reader(stored):
    from safetensors import safe_open

    shutil.copy(stored[0], stored[0].with_name("copy.safetensors"))
    with safe_open(stored[0].with_name("copy.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["harkd"]) == FACTS
        assert {"parameter/a.weight", "mean/b", "square/b", "master/b", "steps"} < set(file.keys())
