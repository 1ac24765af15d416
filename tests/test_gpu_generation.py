"""tools.gpu_generation without a GPU: every line of it runs on the CPU with tiny models, and bursts that go wrong are told."""

import json
import time

import pytest
import torch

from harkd.qwen3.linear import join
from harkd.sampling import burst
from harkd.sampling.request import recommended
from tests.tiny import tiny_config
from tools import gpu_check, gpu_generation
from tools.gpu_check import Record
from tools.gpu_generation import Case, measure
from tools.make_checkpoint import random_model

CONFIG = tiny_config(vocab_size=2100, dtype="float32", tie_word_embeddings=True)
SAME = (
    Case("bursts", CONFIG, 3, prefix=20, own=10, new=20),
    Case("sampled bursts", CONFIG, 2, prefix=20, own=10, new=20, sampling=recommended(True)),
)
CASES = (
    Case("small", CONFIG, 3, prefix=20, own=10, new=18, least={"decode_to_limit": 1e6, "to_transformers": 0.0, "first_token": 0.0}),
    Case("large", tiny_config(vocab_size=2100), 2, prefix=20, own=10, new=18),
)


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "generation.json", {"bytes_per_second": 1e12, "operations_per_second": 1e15})


def test_every_measurement_runs(record, capsys):
    measure(record, time.monotonic() + 600, CASES, SAME, "cpu")
    assert record.wrong == []
    near = pytest.approx(0, abs=1e-3)
    alike = {f"{name}: share of tokens alike": 1.0 for name in ("bursts", "sampled bursts")}
    assert record.checks == alike | {f"{name}: logprobs apart": near for name in ("bursts", "sampled bursts")}
    assert set(record.ratios) == {"small, decode_to_limit", "small, to_transformers", "small, first_token", "large, decode_to_limit"}
    assert all(0 <= ratio < 1e3 for ratio in record.ratios.values()) and record.ratios["small, to_transformers"] > 0.1
    for name in ("small", "large"):
        assert 0 < record.seconds[f"{name}, limit of a step"] < record.seconds[f"{name}, step"] < record.seconds[f"{name}, whole"]
    assert json.loads(record.path.read_text())["ratios"] == record.ratios
    out = capsys.readouterr().out
    assert out.count("MISSED") == 1 and "small, decode_to_limit  MISSED" in out


def test_the_limit_is_what_a_step_must_read(record):
    case, model = CASES[1], join(random_model(CASES[1].config))
    layer = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 16
    weights = 4 * (2 * layer + 32 + 2100 * 32)  # the head, and not the embedding
    cached = 4 * 2 * 2 * 2 * 16 * (20 + 2 * (10 + 9))
    assert gpu_generation.limit(case, model, record.machine) == pytest.approx((weights + cached) / 1e12)
    slow = {"bytes_per_second": 1e30, "operations_per_second": 1e9}
    assert gpu_generation.limit(case, model, slow) == pytest.approx(2 * 2 * weights / 4 / 1e9)


def test_wrong_bursts_failures_and_lack_of_time_are_told(record, monkeypatch, capsys):
    advance = burst.Burst._advance

    def forgetful(self, board, sampling):
        advance(self, board, sampling)
        board.token.zero_()

    with monkeypatch.context() as patch:
        patch.setattr(burst.Burst, "_advance", forgetful)
        measure(record, time.monotonic() + 600, (), SAME[:1], "cpu")
    assert "tokens alike" in record.wrong[0] and "wrong" in capsys.readouterr().out
    monkeypatch.setattr(gpu_generation, "random_model", lambda *_: 1 / 0)
    measure(record, time.monotonic() + 600, CASES, (), "cpu")
    assert ["ZeroDivisionError" in text for text in record.wrong[1:]] == [True, True, False]  # and transformers has nothing to stand beside
    measure(record, time.monotonic() - 1, CASES, SAME, "cpu")
    assert len(record.wrong) == 4 and len(record.skipped) == 2 + 2 + 1


def test_it_is_a_part_of_the_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"gpu": "none", "torch": "2", "triton": "3"})
    monkeypatch.setattr(gpu_generation, "measure", lambda record, deadline: record.ratios.update({"0.6B, first_token": 1.5}))
    assert gpu_check.main(["--only", "generation", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"] == {"0.6B, first_token": 1.5}
