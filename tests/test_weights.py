"""Checkpoints: what is read, converted and written, what is refused, and how much memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harkd.errors import UserError
from harkd.qwen3.model import Qwen3
from harkd.qwen3.weights import as_device, fill, load_model, model_size, read_header, save_model
from tests.helpers import ROOT
from tests.tiny import random_model, tiny_config, tiny_model, transformers_model

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def same(model, truth, dtype=None) -> bool:
    """Every parameter bit for bit."""
    left, right = dict(model.named_parameters()), dict(truth.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name].to(dtype or right[name].dtype)) for name in left)


def refusal(folder, *words, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder, device="cpu", **arguments)
    said = str(caught.value)
    assert all(str(word) in said for word in (folder, *words)) and "\n" not in said, said
    return said


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
def test_single_file_in_every_dtype(tmp_path, stored, tied):
    name = str(stored).removeprefix("torch.")
    tiny_model(tmp_path, dtype=name, tie_word_embeddings=tied)
    truth = random_model(dtype=name, tie_word_embeddings=tied)
    model = load_model(tmp_path, device="cpu")
    assert model.dtype == stored and not model.training and same(model, truth)
    assert not same(model, random_model(seed=1, dtype=name, tie_word_embeddings=tied))
    parameters = sum(p.numel() for p in model.parameters())
    assert model_size(tmp_path) == {"parameters": parameters, "bytes": sum(p.nbytes for p in model.parameters())}
    for dtype in DTYPES:
        assert same(load_model(str(tmp_path), "cpu", dtype), truth, dtype)
        assert model_size(str(tmp_path), dtype) == {"parameters": parameters, "bytes": parameters * dtype.itemsize}
    with pytest.raises(UserError, match="int8"):
        load_model(tmp_path, "cpu", "int8")


def test_conversion_in_pieces(tmp_path, monkeypatch):
    tiny_model(tmp_path)
    monkeypatch.setattr("harkd.tensors.BUFFER", 1000)
    assert same(load_model(tmp_path, "cpu", "bfloat16"), random_model(), torch.bfloat16)


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_ours_and_of_transformers(tmp_path, tied):
    pytest.importorskip("transformers")
    truth = random_model(tie_word_embeddings=tied)
    save_model(truth, tmp_path / "ours", shard_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3 and not list((tmp_path / "ours").glob("*.tmp"))
    assert same(load_model(tmp_path / "ours", "cpu"), truth)
    theirs = transformers_model(tmp_path / "ours")
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in truth.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    assert same(load_model(tmp_path / "theirs", "cpu"), truth)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert same(load_model(tmp_path / "half", "cpu"), truth, torch.bfloat16)


def test_a_folder_written_again_holds_the_second_model(tmp_path):
    first, second = random_model(1), random_model(2)
    for shard_bytes in (30_000, 1 << 30, 30_000):
        save_model(first, tmp_path, shard_bytes=shard_bytes)
        save_model(second, tmp_path, shard_bytes=1 << 30 if shard_bytes == 30_000 else 30_000)
        assert same(load_model(tmp_path, "cpu"), second)


def test_tied_head_stored_twice(tmp_path):
    tiny_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    assert same(load_model(tmp_path, "cpu"), random_model(tie_word_embeddings=True))
    for wrong in (head.index_fill(0, torch.tensor([383]), 0.5), head[:-1].clone(), head.half()):
        save_file({**tensors, "lm_head.weight": wrong}, tmp_path / "model.safetensors")
        refusal(tmp_path, "model.safetensors", "lm_head.weight differs")


def test_missing_unknown_and_misshapen(tmp_path):
    tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_norm.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    refusal(tmp_path, "lacks", name)
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(2)}, path)
    refusal(tmp_path, path, "model.layers.2.mlp.up_proj.weight")
    head = tensors["lm_head.weight"]
    for wrong in (head.T.contiguous(), head[None].clone(), head[:-1].clone()):
        save_file({**tensors, "lm_head.weight": wrong}, path)
        refusal(tmp_path, path, "lm_head.weight", list(wrong.shape), [384, 32])
    save_file({**tensors, "lm_head.weight": torch.zeros(384, 32, dtype=torch.int8)}, path)
    refusal(tmp_path, path, "I8")
    path.unlink()
    refusal(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    refusal(tmp_path, "model.safetensors")


def test_truncated_at_any_point(tmp_path):
    tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(tmp_path, path, "truncated")
    path.write_bytes(whole + b"\0")
    refusal(tmp_path, path, "damaged")
    path.write_bytes(whole)
    assert same(load_model(tmp_path, "cpu"), random_model())


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"{", b"", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"a": 1}', b'{"a": {}}', b'{"a": null}', {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(-8, 0), "b": entry(0, 16)}, {"a": entry(0, 8), "b": entry(9, 17)}, {"a": entry(8, 16)}, {"a": entry(0, 16)},
        {"a": entry(16, 0)},
        {"a": entry(0, 16, (-2, -2))}, {"a": entry(0, 16, (4.0,))}, {"a": entry(0, 16, ("4",))}, {"a": entry(0.0, 16.0, (4,))},
        {"a": entry(0, 16, (4,), "F8_E4M3")},
        {"a": entry(0, 16, (4,), ["F32"])}, {"a": {**entry(0, 16, (4,)), "data_offsets": [0, 8, 16]}}, {"a": {**entry(0, 16, (4,)),
        "data_offsets": "0 16"}},
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path, header):
    """Each of these is 16 bytes of data behind a header that is not JSON, or does not fit them."""
    path = tmp_path / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_sound_header(tmp_path):
    text = json.dumps({"__metadata__": {"format": "pt"}, "b": entry(8, 16), "a": entry(0, 8), "none": entry(8, 8, (0, 3))}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    stored = read_header(tmp_path / "x.safetensors")
    found = {name: (tensor.begin - 8 - len(text), tensor.size, tensor.shape) for name, tensor in stored.items()}
    assert found == {"a": (0, 8, (2,)), "b": (8, 8, (2,)), "none": (8, 0, (0, 3))}


@pytest.mark.parametrize(
    "weight_map, words",
    [
        ({"lm_head.weight": "model-00009-of-00009.safetensors"}, "model-00009-of-00009.safetensors"),
        ({"lm_head.weight": "../model-00001-of-00003.safetensors"}, "no file of its folder"),
        ({"lm_head.weight": "/etc/passwd"}, "no file of its folder"),
        ({"lm_head.weight": ["x"]}, "no file of its folder"),
        ({"lm_head.weight": ".."}, ".."),
        ({"extra.weight": "model-00001-of-00003.safetensors"}, "same tensors"),
        (None, "index.json"),
        ("x", "index.json"),
        ("absent", "index.json"),
    ],
)
def test_damaged_index(tmp_path, weight_map, words):
    save_model(random_model(), tmp_path, shard_bytes=70_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    index["weight_map"] = {**index["weight_map"], **weight_map} if isinstance(weight_map, dict) else weight_map
    path.write_text(json.dumps({} if weight_map == "absent" else index))
    refusal(tmp_path, words)
    path.write_text("{")
    refusal(tmp_path, path)


def test_a_shard_that_is_gone_or_cut(tmp_path):
    save_model(random_model(), tmp_path, shard_bytes=70_000)
    path = tmp_path / "model-00002-of-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    refusal(tmp_path, path, "truncated")
    path.unlink()
    refusal(tmp_path, path)


def sparse_checkpoint(folder: Path) -> int:
    """A bfloat16 checkpoint of more than 500 MB, mostly holes on the disk; the last element of each tensor is 1. Returns its bytes."""
    sizes = dict(vocab_size=100_000, hidden_size=1024, intermediate_size=50_000, num_hidden_layers=1)
    config = tiny_config(**sizes, dtype="bfloat16", tie_word_embeddings=True)
    with torch.device("meta"):
        model = Qwen3(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        header[name] = entry(end, end + 2 * parameter.numel(), parameter.shape, "BF16")
        end += 2 * parameter.numel()
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in header.values():
            file.seek(8 + len(text) + tensor["data_offsets"][1] - 2)
            file.write(b"\x80\x3f")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return end


CHILD = """
import sys, torch
import harkd
from harkd.qwen3.weights import load_model

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

before = memory("VmRSS")
model = load_model(sys.argv[1], device="cpu", dtype=sys.argv[2])
assert all(float(p.flatten()[-1]) == 1 and float(p.flatten()[-2]) == 0 for p in model.parameters())
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peak_memory(tmp_path, dtype):
    """Neither reading nor converting takes more than 1.15 x the weights."""
    weights = sparse_checkpoint(tmp_path)
    assert weights >= 500e6
    try:
        command, environment = [sys.executable, "-c", CHILD, tmp_path, dtype], {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    finally:
        (tmp_path / "model.safetensors").unlink()
    assert child.returncode == 0, child.stderr
    ratio = int(child.stdout) / weights
    print(f"peak memory {ratio:.3f} x the weights ({dtype})")
    assert 0.95 < ratio <= 1.15


def test_a_device_that_cannot_be_used_is_told_before_anything_is_read(tmp_path):
    assert as_device("cpu") == torch.device("cpu") and as_device().type in ("cpu", "cuda")
    for device in ("nonsense", "meta", "cuda:99", torch.device("meta")):
        with pytest.raises(UserError, match=f"the device '{device}' cannot be used here: ") as caught:
            load_model(tmp_path / "nowhere", device=device)
        assert "\n" not in str(caught.value)


def test_weights_that_find_no_memory_are_told(tmp_path, monkeypatch):
    def empty(*shape, **options):
        raise RuntimeError("not enough memory\nof many lines")

    tiny_model(tmp_path)
    with torch.device("meta"):
        model = Qwen3(tiny_config())
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match="no memory for the weights of .*: not enough memory$"):
        fill(model, tmp_path, torch.float32, torch.device("cpu"))
