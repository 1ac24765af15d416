"""A model of which each of N processes holds a part of every layer (Megatron-LM, arXiv 1909.08053).

    attention  heads are divided: rows of q, k, v and columns of o           y = sum over the processes of o_i(attention_i(x))
    MLP        its width is divided: rows of gate and up, columns of down    y = sum over the processes of down_i(silu(gate_i(x)) * up_i(x))

Of experts each is divided like an MLP: all processes have the same work whichever experts the tokens choose, and the experts' sum is added
up once. A key/value head that several processes need is held by each of them. Embedding, head, norms and router are whole everywhere: the
two vocabulary matrices are 3 of the 61 GiB of 32B, 2 of the 438 of 235B-A22B, and divided they would need logits gathered in every step.
"""

from __future__ import annotations

from dataclasses import replace

from harkd.errors import UserError
from harkd.qwen3.config import PROJECTIONS, Qwen3Config


def divided(config: Qwen3Config, size: int) -> Qwen3Config:
    """The sizes of one of `size` parts. Raises UserError where there are no equal ones."""
    width = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    parts = {}
    for name in ("num_attention_heads", "num_key_value_heads", width):
        count = getattr(config, name)
        if count % size and (name != "num_key_value_heads" or size % count):
            raise UserError(f"{size} processes cannot share a model whose {name} is {count}: take another number of them")
        parts[name] = max(count // size, 1)
    return replace(config, **parts)


def cut(name: str, whole: Qwen3Config, rank: int, size: int) -> tuple[int, int, int]:
    """What process `rank` of `size` holds of a parameter: (along which axis it is cut, which part, of how many)."""
    module = name.split(".")[-2]
    if module not in PROJECTIONS:
        return 0, 0, 1
    parts = min(size, whole.num_key_value_heads) if module in ("k_proj", "v_proj") else size
    return int(module in ("o_proj", "down_proj")), rank * parts // size, parts
