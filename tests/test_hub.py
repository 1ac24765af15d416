"""From a name to a folder, without a network."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from harkd.errors import UserError
from harkd.qwen3.hub import ADAPTER_FILES, MODEL_FILES, TOKENIZER_FILES, resolve


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What snapshot_download was asked for; it gives tmp_path."""
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: calls.append((args, kwargs)) or str(tmp_path))
    return calls


def test_a_folder_is_itself(tmp_path, asked, monkeypatch):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path and not asked
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "local").mkdir(parents=True)
    assert resolve("Qwen/local") == Path("Qwen/local") and not asked
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/Qwen") == tmp_path / "Qwen"


@pytest.mark.parametrize(
    "ref", ["nowhere", "./no/where", "/no/where", "a/b/c", "Qwen/", "Qwen/Qwen3 0.6B", "../x/y", "https://host/model", "Qwen/Qwen3\n", "~nobody/x"]
)
def test_neither_folder_nor_hub_id(ref, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        resolve(ref)
    assert not asked


def test_a_file_is_refused(tmp_path, asked):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve(tmp_path / "model.safetensors")
    assert not asked


@pytest.mark.parametrize("patterns", [MODEL_FILES, TOKENIZER_FILES, ADAPTER_FILES])
def test_only_named_files_are_downloaded(patterns, asked, tmp_path):
    assert resolve("Qwen/Qwen3-0.6B", patterns) == tmp_path
    assert asked == [(("Qwen/Qwen3-0.6B",), {"allow_patterns": list(patterns)})]


def test_the_patterns_let_no_pickle_in():
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    unsafe = ["pytorch_model.bin", "model.pt", "model.pth", "training_args.bin", "pytorch_model.bin.index.json"]
    unsafe += ["modeling_qwen3.py", "model.gguf", "adapter_model.bin"]
    assert list(filter_repo_objects(files + unsafe, allow_patterns=list(MODEL_FILES))) == files
    assert not list(filter_repo_objects(unsafe, allow_patterns=[*TOKENIZER_FILES, *ADAPTER_FILES]))


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("not in the cache\nand offline"), OSError("disk full"), ConnectionError("refused"), OSError()]
)
def test_what_the_hub_does_not_give(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        resolve("Qwen/Qwen3-0.6B")
    said = str(caught.value)
    assert "Qwen/Qwen3-0.6B" in said and "\n" not in said and (str(error).split("\n")[0] or "OSError") in said


def test_offline_for_true(monkeypatch, tmp_path):
    """With the real function: nothing in an empty cache, and no network asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="Qwen/Qwen3-0.6B"):
        resolve("Qwen/Qwen3-0.6B")
