"""python -m harkd.train --export: the merged model, and what is in its way."""

import pytest
import torch

from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.train import main
from tests.door_cases import content, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.train_cases import truth  # noqa: F401


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_export(truth, tied, tmp_path):
    from tests.tiny import tiny_model, transformers_model

    base = tiny_model(tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=tied)
    truth = [*truth, "--model", base, "--epochs", 3, "--limit", 4, "--export", tmp_path / "merged/model"]
    result = run(main, *truth)
    assert result["export"] == str(tmp_path / "merged/model") and [path.name for path in (tmp_path / "merged").iterdir()] == ["model"]
    ids = torch.tensor(load_tokenizer(tmp_path / "merged/model").encode('{"event_id": 1, "activity": "COOKING"}'))
    plain, adapted, merged = (load_model(*ref).logits(ids) for ref in ((base,), (base, None, None, tmp_path / "out"), (tmp_path / "merged/model",)))
    assert torch.allclose(adapted, merged, atol=1e-4) and not torch.allclose(plain, merged, atol=1e-2)
    with torch.no_grad():
        assert torch.allclose(transformers_model(tmp_path / "merged/model")(ids[None]).logits[0], merged, atol=1e-4)

    before = content(tmp_path / "merged/model")
    assert run(main, *truth) == result and content(tmp_path / "merged/model") == before  # the same command once more
    assert run(main, *truth, "--export", tmp_path / "second")["export"] == str(tmp_path / "second")
    second = content(tmp_path / "second")
    assert second["model.safetensors"] == before["model.safetensors"]
    code, _, _, err = outcome(main, *truth, "--export", tmp_path / "out")
    assert code == 2 and "is the run's own folder" in err
    assert "cannot be written" in outcome(main, *truth, "--export", base / "config.json/merged")[3]


def test_a_full_export_folder_is_told_before_training(truth, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    code, _, _, err = outcome(main, *truth, "--export", tmp_path / "full")
    assert code == 2 and "is not empty: name another folder with --export" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and content(tmp_path / "full") == {"thesis.txt": b"mine"}


def test_an_export_that_cannot_be_written_is_told_before_training(truth, tmp_path):
    (tmp_path / "file").write_text("x")
    for export, words in (("out", "the run's own folder"), ("out/../out", "own folder"), (".", "or holds it"), ("file/merged", "cannot be written")):
        code, _, _, err = outcome(main, *truth, "--export", tmp_path / export)
        assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_damaged_note_of_an_export_is_told(truth, tmp_path):
    truth = [*truth, "--epochs", 1, "--limit", 1, "--validation", 0, "--export", tmp_path / "merged"]
    run(main, *truth)
    (tmp_path / "merged/harkd.json").write_text("{")
    code, _, _, err = outcome(main, *truth)
    assert code == 2 and "merged/harkd.json cannot be read" in err
