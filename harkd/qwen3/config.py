"""The shape of a Qwen3, dense or a mixture of experts, read from Hugging Face's config.json field by field.

A field that would change the computation and is not supported here is refused by its name; a field that is not known is refused too unless
it is empty, because nobody can say that it changes nothing. Source of the fields: config.json of Qwen3-0.6B to 32B, 30B-A3B and
235B-A22B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harkd.errors import UserError
from harkd.files import read_json

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the seven linear maps of a layer


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a dense Qwen3; the names are those of config.json."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # never derived: heads x head_dim differs from the hidden size in 0.6B, 4B and 32B
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # of the stored weights

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json that transformers, vLLM and harkd read."""
        fields = {name: value for name, value in vars(self).items() if name != "dtype"}
        what = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**what, **fields, **_FIXED_ON_EXPORT, "torch_dtype": self.dtype}


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Sizes of a Qwen3 whose layers have experts in place of an MLP: qwen3/mlp.py."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # the width of one expert
    norm_topk_prob: bool = False  # whether the weights of a token's experts sum to 1


_FIXED_ON_EXPORT = {
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "use_sliding_window": False,
    "use_cache": True,
}  # fmt: skip
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_REQUIRED_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_OPTIONAL = {"rms_norm_eps": float, "max_position_embeddings": int, "tie_word_embeddings": bool}
# fields that must have these values, where they are given
_DEMANDED = {
    "hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,), "rope_scaling": (None,),
    "attention_dropout": (0, None), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None),
}  # fmt: skip
# fields that change nothing that is computed here
_IGNORED = {
    "architectures", "model_type", "torch_dtype", "dtype", "rope_theta", "rope_parameters", "transformers_version", "use_cache",
    "initializer_range", "max_window_layers", "sliding_window", "layer_types", "bos_token_id", "eos_token_id", "pad_token_id",
    "chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type", "_name_or_path", "tokenizer_class", "is_decoder",
    "router_aux_loss_coef",
}  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "float64")


def read_config(folder: Path) -> Qwen3Config:
    """Read and check `folder`/config.json. Raises UserError that names the file and the field."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no config.json, so it is not a model folder in Hugging Face's layout")
    return check_config(read_json(path), path)


def check_config(fields: Mapping[str, Any], source: Path | str) -> Qwen3Config:
    """Turn the fields of a config.json into a Qwen3Config. Raises UserError that names `source` and the field that is not supported."""
    kind = {cls.model_type: cls for cls in (Qwen3Config, Qwen3MoeConfig)}.get(str(fields.get("model_type")))
    if kind is None:
        raise UserError(f"{source} describes a model of type {fields.get('model_type')!r}, and harkd runs 'qwen3' and 'qwen3_moe' alone")
    required, optional = _REQUIRED, _OPTIONAL
    if kind is Qwen3MoeConfig:
        required, optional = (*_REQUIRED, *_REQUIRED_MOE), {**_OPTIONAL, "norm_topk_prob": bool}
        fields = {"num_experts": fields.get("num_local_experts"), **fields}  # as transformers 5 writes it
    for name, allowed in _DEMANDED.items():
        if name in fields and fields[name] not in allowed:
            raise UserError(f"{source}: {name} = {fields[name]!r} is not supported (only {allowed[0]!r})")
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise UserError(f"{source}: layer_types other than 'full_attention' are not supported")
    known = {*required, *optional, *_DEMANDED, *_IGNORED, *(["num_local_experts"] if kind is Qwen3MoeConfig else [])}
    for name, value in fields.items():
        if name not in known and value not in (None, False, 0, [], {}, ""):
            raise UserError(f"{source}: the field {name!r} is not known to harkd, so it cannot say what it would change")
    config = kind(
        **{name: _positive_int(fields, name, source) for name in required},
        **{name: _of_type(fields, name, type_, source) for name, type_ in optional.items() if name in fields},
        rope_theta=_rope_theta(fields, source),
        dtype=_dtype(fields, source),
    )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError(f"{source}: attention heads must be a multiple of key/value heads, and head_dim even")
    if isinstance(config, Qwen3MoeConfig) and config.num_experts_per_tok > config.num_experts:
        raise UserError(f"{source}: num_experts_per_tok must be at most num_experts ({config.num_experts})")
    return config


def _positive_int(fields: Mapping[str, Any], name: str, source: Path | str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{source}: {name} must be a positive whole number, not {value!r}")
    return value


def _of_type(fields: Mapping[str, Any], name: str, kind: type, source: Path | str) -> Any:
    value = fields[name]
    if type(value) is not kind or (kind is not bool and not 0 < value < math.inf):
        raise UserError(f"{source}: {name} must be a {'positive ' if kind is not bool else ''}{kind.__name__}, not {value!r}")
    return value


def _rope_theta(fields: Mapping[str, Any], source: Path | str) -> float:
    """The base of the rotary frequencies: `rope_theta`, or `rope_parameters` as transformers 5 writes it."""
    rope = fields.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: rope_parameters must be an object, not {rope!r}")
    unsupported = {name: value for name, value in rope.items() if name not in ("rope_type", "rope_theta")}
    if rope.get("rope_type", "default") != "default" or unsupported:
        raise UserError(f"{source}: rope_parameters = {rope!r} is not supported (only the default type)")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise UserError(f"{source}: rope_theta must be a positive number, not {theta!r}")
    return float(theta)


def _dtype(fields: Mapping[str, Any], source: Path | str) -> str:
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"{source}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype
