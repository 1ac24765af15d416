"""config.json: what is read, what is refused and by which name."""

import json

import pytest

from harkd.errors import UserError
from harkd.qwen3.config import Qwen3Config, check_config, read_config
from tests.helpers import QWEN3, needs_qwen3
from tests.tiny import tiny_config

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 5000000, "rope_scaling": None,
    "max_position_embeddings": 4096, "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 1,
    "eos_token_id": [2, 1],
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "torch_dtype": "bfloat16", "use_cache": True,
    "tie_word_embeddings": True,
}  # fmt: skip
ABSENT = object()


def read(folder, **changes) -> Qwen3Config:
    fields = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


def test_every_field_is_read(tmp_path):
    assert read(tmp_path) == Qwen3Config(384, 32, 48, 2, 4, 2, 16, 1e-6, 5e6, 4096, True, "bfloat16")
    assert read(tmp_path, rope_theta=10000.0).rope_theta == 1e4
    assert read(tmp_path, tie_word_embeddings=ABSENT).tie_word_embeddings is False
    assert read(tmp_path, torch_dtype=ABSENT, dtype="float16").dtype == "float16"
    assert read(tmp_path, quantization_config=None, pruned_heads={}, partial_rotary_factor=ABSENT) == read(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ("rope_parameters", "default"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", 5),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("num_experts", 128),
        ("something_new", 1),
        ("partial_rotary_factor", 0.5),
        ("head_dim", ABSENT),
        ("head_dim", None),
        ("vocab_size", ABSENT),
        ("hidden_size", "32"),
        ("hidden_size", 32.0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", 1),
        ("tie_word_embeddings", "true"),
        ("max_position_embeddings", 4096.5),
        ("rope_theta", ABSENT),
        ("rope_theta", "1000000"),
        ("rope_theta", -1),
        ("rope_theta", True),
        ("rope_theta", float("inf")),
        ("torch_dtype", "int8"),
        ("torch_dtype", ["bfloat16"]),
        ("model_type", "qwen2"),
        ("model_type", ABSENT),
    ],
)
def test_refusals_name_file_and_field(tmp_path, field, value):
    with pytest.raises(UserError) as caught:
        read(tmp_path, **{field: value})
    said = str(caught.value)
    words = {"torch_dtype": "dtype", "model_type": "type", "num_key_value_heads": "key/value heads"}
    assert str(tmp_path / "config.json") in said and words.get(field, field) in said and "\n" not in said


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"qwen3"', "\x00", "model_type: qwen3"])
def test_not_a_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json.*JSON"):
        read_config(tmp_path)


def test_not_utf8_and_no_file(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(UserError, match="config.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changes", [{}, {"rope_theta": 1e4, "tie_word_embeddings": True, "dtype": "float16", "rms_norm_eps": 1e-5, "head_dim": 64}]
)
def test_what_is_written_is_read_again(tmp_path, changes):
    config = tiny_config(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert read_config(tmp_path) == config
    assert check_config({**config.to_dict(), "hidden_size": 64}, "here") != config


@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6])
def test_transformers_reads_what_is_written_and_is_read(tmp_path, theta):
    transformers = pytest.importorskip("transformers")
    config = tiny_config(rope_theta=theta, tie_word_embeddings=True, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3Config"
    assert (getattr(theirs, "rope_parameters", None) or {"rope_theta": getattr(theirs, "rope_theta", None)})["rope_theta"] == theta
    for name in vars(config).keys() - {"rope_theta", "dtype"}:
        assert getattr(theirs, name) == getattr(config, name)
    assert theirs.tie_word_embeddings and "bfloat16" in str(theirs.dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert read_config(tmp_path / "theirs") == config, written
    older = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    older |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert check_config(older, "older") == config


@needs_qwen3
def test_the_published_configs():
    for name, fields in json.loads((QWEN3 / "configs.json").read_text()).items():
        config = check_config(fields, name)
        assert config.head_dim == 128 and config.rope_theta == 1e6 and config.vocab_size == 151_936
        assert getattr(config, "num_experts", 0) == (128 if "-A" in name else 0)
