"""The models that ship with harkd: ordinary Hugging Face folders, alike but for their size, with which the doors run without arguments."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import harkd
import harkd.eval
import harkd.generate
import harkd.train
from harkd.qwen3.config import read_config
from harkd.qwen3.hub import EMBEDDED, resolve
from tools.pretrain_nano import known_words

TEACHER, STUDENT = EMBEDDED


def weights(name):
    return resolve(name) / "model.safetensors"


def test_only_the_size_differs():
    teacher, student = (read_config(resolve(name)) for name in EMBEDDED)
    assert teacher.head_dim == student.head_dim == 64 and 2000 <= teacher.vocab_size == student.vocab_size <= 4096
    assert weights(TEACHER).stat().st_size <= 10e6
    counts = [sum(p.numel() for p in harkd.load_model(name).parameters()) for name in EMBEDDED]
    assert counts[0] >= 8 * counts[1] > 0
    assert (resolve(TEACHER) / "tokenizer.json").read_bytes() == (resolve(STUDENT) / "tokenizer.json").read_bytes()
    tokenizer = harkd.load_tokenizer(STUDENT)
    assert [len(tokenizer.encode(token)) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")] == [1] * 5


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_two_words_look_alike(name):
    """Tokens that no text of the pretraining held once had one and the same embedding: the labels of a real home were one to the student."""
    tokenizer, rows = harkd.load_tokenizer(name), harkd.load_model(name).model.embed_tokens.weight
    ids = sorted({id for word in known_words(tokenizer) for id in tokenizer.encode(f" {word}_{word}")})
    assert len(ids) > 1700 and len(rows[ids].unique(dim=0)) == len(ids)


@pytest.mark.parametrize("name", EMBEDDED)
def test_transformers_gives_the_same_logits(name):
    theirs = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32)
    ids = harkd.load_tokenizer(name).encode("kitchen fridge opened, kitchen fridge closed")
    with torch.no_grad():
        want, got = theirs(torch.tensor([ids])).logits[0], harkd.load_model(name, dtype="float32").logits(ids)
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_doors_run_without_a_model_or_a_home(tmp_path, monkeypatch, capsys):
    """As the demonstration does it, on a few windows: answers are well formed, and the rows are all there."""
    monkeypatch.chdir(tmp_path)
    assert harkd.generate.main(["--limit", "10"]) == 0
    traces = last_line(capsys)
    assert traces["model"] == TEACHER and traces["traces"] == 10 and traces["incomplete"] <= 2 and traces["correct"] > 0
    assert harkd.train.main(["--keep", "all", "--epochs", "1"]) == 0
    assert last_line(capsys)["examples"] + last_line_examples(tmp_path) == 10 - traces["incomplete"] > 0
    asked = json.loads((tmp_path / "runs/default/adapter/settings.json").read_text())
    assert [asked[name] for name in ("lora_rank", "lora_alpha", "epochs", "batch_tokens", "validation")] == [64, 64.0, 1, 4096, 0.0]
    assert harkd.eval.main(["--limit", "6"]) == 0
    rows = {row["name"]: row for row in last_line(capsys)["models"]}
    assert list(rows) == [f"{TEACHER} with reasoning", f"{STUDENT} with reasoning", f"{STUDENT} + adapter", "baseline:majority", "baseline:sensor"]
    assert all(row["malformed"] <= 0.2 for row in rows.values())
    assert rows[f"{TEACHER} with reasoning"]["accuracy"] > rows["baseline:majority"]["accuracy"]


def last_line_examples(folder: Path) -> int:
    return json.loads((folder / "runs/default/adapter/result.json").read_text())["validation_examples"]
