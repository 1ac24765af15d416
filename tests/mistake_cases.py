"""What the tests of mistakes share: arguments that work, and how a door refuses others."""

from pathlib import Path

import pytest

from harkd.eval import main as evaluate
from harkd.generate import main as generate
from harkd.train import main as train
from tests.door_cases import data, model, outcome, short_prompts  # noqa: F401

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
