"""A tokenizer and a model of Qwen3's kind, small enough to be made in every test."""

from pathlib import Path

import torch

from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.model import Qwen3, initialise
from harkd.qwen3.weights import as_dtype, save_model
from tools.pretrain_nano import save_tokenizer, train_tokenizer

CORPUS = [
    'system\nYou name activities at home.\nuser\n[{"event_id": 1, "time": "07:22:45", "description": "kitchen fridge opened"}]',
    'assistant\n\n\n[{"event_id": 1, "activity": "COOKING"}, {"event_id": 2, "activity": "EATING"}]  dining room chair occupied',
]


def tiny_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `folder`: 256 bytes, a few merges, five special tokens."""
    save_tokenizer(train_tokenizer(CORPUS, 345), folder)
    return folder


def tiny_config(**changes) -> Qwen3Config:
    """Two layers whose heads x head_dim (64) differs from the width (32), in float32; the vocabulary is padded above the tokenizer's."""
    sizes = dict(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=4096)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return Qwen3Config(**{**sizes, **heads, "dtype": "float32", **changes})


def random_model(seed: int = 0, std: float = 0.15, dtype: torch.dtype | None = None, **changes) -> Qwen3:
    """A tiny model in memory, its norms random too. At this spread the logits are of order one and attention is not uniform."""
    config = tiny_config(**changes)
    model = initialise(Qwen3(config), seed, std)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.to(as_dtype(dtype or config.dtype)).eval()


def tiny_model(folder: Path, seed: int = 0, std: float = 0.15, **changes) -> Path:
    """Write a tiny random Qwen3 checkpoint and the tiny tokenizer into `folder`; `changes` are fields of Qwen3Config."""
    tiny_tokenizer(folder)
    save_model(random_model(seed, std, **changes), folder)
    return folder


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32):
    """The checkpoint in transformers, with eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
