"""LoRA: low-rank adapters beside frozen linear maps, in PEFT's file layout.

    y = x W^T + s (x A^T) B^T,    s = alpha / r    (rsLoRA: alpha / sqrt(r))

x [T, in], W [out, in] frozen, A [r, in], B [out, r]. A is drawn as PEFT draws it (uniform in +-1/sqrt(in)), B is zero, so that an untrained
adapter changes nothing. A and B are kept in float32 (float64 beside float64 weights) and cast to x's dtype for their products. Sources:
arXiv 2106.09685, 2312.03732 (rsLoRA).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harkd.errors import UserError
from harkd.files import read_json, write_json
from harkd.qwen3.config import PROJECTIONS, Qwen3MoeConfig
from harkd.qwen3.linear import Linear, LoraLinear, separate
from harkd.qwen3.model import Qwen3
from harkd.tensors import allocating, read_header, read_into, write_tensors

_PEFT_PREFIX = "base_model.model."
# fields of adapter_config.json that change nothing in a stored adapter, or are read; any other must be empty or have one of the plain
# values
_NEUTRAL = {
    "peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "lora_dropout", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# other ways to draw the first A and B change the base's weights, so that the adapter would not fit the ones on disk
_PLAIN = {"bias": ("none", None), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}


@dataclass(frozen=True)
class LoraConfig:
    """Rank r, alpha, which of the seven projections carry an adapter, and whether the scale is rsLoRA's."""

    r: int = 16
    alpha: float = 32
    target_modules: tuple[str, ...] = PROJECTIONS
    rslora: bool = False

    def __post_init__(self) -> None:
        unknown = [str(name) for name in self.target_modules if name not in PROJECTIONS]
        if unknown or not self.target_modules:
            raise UserError(f"LoRA's target modules must be among {', '.join(PROJECTIONS)}, not {', '.join(unknown) or 'none'}")
        if self.r < 1:
            raise UserError(f"LoRA's rank must be at least 1, not {self.r}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def add_lora(model: Qwen3, config: LoraConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze the model and put a fresh adapter on its projections, in place. Returns the adapter's parameters by PEFT's names."""
    if _lora_layers(model):
        raise UserError("the model carries an adapter already: merge it first")
    if isinstance(model.config, Qwen3MoeConfig):
        raise UserError("adapters are for dense models: one with experts can be a teacher, and no student")
    separate(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in config.target_modules and isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            with torch.no_grad(), allocating(f"an adapter of rank {config.r}"):
                layer = LoraLinear(module, config.r, config.scale)
                layer.lora_A.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
            setattr(model.get_submodule(parent), leaf, layer)
    return lora_parameters(model)


def _lora_layers(model: Qwen3) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: Qwen3) -> dict[str, nn.Parameter]:
    """The adapter's parameters by PEFT's names: `base_model.model.<path>.lora_A.weight` [r, in], `.lora_B.weight` [out, r]."""
    return {
        f"{_PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part)
        for name, layer in _lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def merge(model: Qwen3) -> Qwen3:
    """Fold the adapter into the weights, W + s B A computed in float32, and take it off, in place."""
    for name, layer in _lora_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        with torch.no_grad():
            wide = torch.promote_types(layer.weight.dtype, torch.float32)
            merged = layer.weight.to(wide) + layer.scale * (layer.lora_B.to(wide) @ layer.lora_A.to(wide))
            layer.weight.copy_(merged)
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        plain.weight = layer.weight
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def fingerprint(model: Qwen3) -> str:
    """16 hex digits that tell one base model from another: of its sizes and of the signs of some of its weights, which no dtype changes."""
    digest = hashlib.sha256(json.dumps({**model.config.to_dict(), "torch_dtype": None}, sort_keys=True).encode())
    layer = model.model.layers[-1]
    mlp = getattr(layer.mlp, "experts", [layer.mlp])[-1]
    for weight in (model.model.embed_tokens.weight, layer.self_attn.q_proj.weight, mlp.down_proj.weight):
        digest.update(torch.signbit(weight.detach()[:64]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(folder: Path, parameters: Mapping[str, Tensor], config: LoraConfig, base: str, notes: Mapping[str, Any]) -> None:
    """Write an adapter in PEFT's layout, and `notes` (template, thinking, answer form, base fingerprint, ...) into harkd.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", parameters)
    write_json(folder / "harkd.json", dict(notes))
    alpha = int(config.alpha) if config.alpha % 1 == 0 else config.alpha  # PEFT and vLLM declare an int
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.r, "lora_alpha": alpha,
        "target_modules": list(config.target_modules), "lora_dropout": 0.0, "bias": "none", "use_rslora": config.rslora,
        "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", fields)


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read PEFT's adapter_config.json. Raises UserError that names what is not plain LoRA on the seven projections."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no adapter_config.json, so it is no LoRA adapter in PEFT's layout")
    fields = read_json(path)
    try:
        kind, r, alpha, targets = fields["peft_type"], int(fields["r"]), float(fields["lora_alpha"]), fields["target_modules"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None
    if kind != "LORA" or not isinstance(targets, Sequence) or isinstance(targets, str):
        raise UserError(f"{path}: only peft_type LORA with a list of target_modules is supported")
    for name, value in fields.items():
        if name not in _NEUTRAL and value not in _PLAIN.get(name, (None, False, [], {})):
            raise UserError(f"{path}: {name} = {value!r} is not supported")
    try:
        return LoraConfig(r, alpha, tuple(sorted(targets, key=str)), bool(fields.get("use_rslora")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_adapter(model: Qwen3, folder: Path) -> LoraConfig:
    """Put a stored adapter on a model, in place: each tensor used exactly once. Raises UserError where it belongs to another base."""
    config = read_adapter_config(folder)
    notes, base = read_notes(folder), fingerprint(model)
    if notes.get("base_fingerprint", base) != base:
        raise UserError(f"the adapter {folder} was trained on another base model ({notes.get('base')!r})")
    stored = read_header(folder / "adapter_model.safetensors")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = add_lora(model, config)
    different = sorted(stored.keys() ^ parameters.keys()) or [
        name for name, parameter in parameters.items() if stored[name].shape != tuple(parameter.shape)
    ]
    if different:
        merge(model)  # an empty adapter: the model is left as it was
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise UserError(f"the adapter {folder} does not fit this base model: {different[0]} is missing, unknown or of another shape")
    for name, parameter in parameters.items():
        read_into(stored[name], parameter)
    return config


def read_notes(folder: Path) -> dict[str, Any]:
    """What harkd wrote beside the adapter: base, base_fingerprint, template, thinking, answer_form; the base alone for one of PEFT's."""
    if (folder / "harkd.json").exists():
        return read_json(folder / "harkd.json")
    config = folder / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path") if config.exists() else None
    return {"base": base} if isinstance(base, str) else {}
