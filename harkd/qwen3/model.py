"""Qwen3, dense, 0.6B to 32B, over packed tokens.

    h = embed(ids)                                                    [T, C]
    for each layer:  h += o(attention(rope(norm(q(x))), rope(norm(k(x))), v(x)))     x = norm(h)
                     h += down(silu(gate(x)) * up(x))                                 x = norm(h)
    logits = head(norm(h))                                            [T, V]

T tokens of all sequences packed one behind the other, C width, H query heads, K key/value heads, D head size, V vocabulary. Which token
sees which is said by `Sequences` (kernels/attention.py), an argument like any other. Parameter names are Hugging Face's; so is the order of
roundings: norms and the softmax in float32, cast before the norm's weight is applied, rotary angles in float32, products in the weights'
dtype. Source: Qwen3 technical report, arXiv 2505.09388; config.json of the models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harkd.errors import UserError
from harkd.kernels.attention import CacheLayer, Sequences, attention
from harkd.kernels.loss import cross_entropy
from harkd.qwen3.cache import Cache
from harkd.qwen3.config import Qwen3Config


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles p * theta^(-2i/D), each [T, 1, D/2] (arXiv 2104.09864)."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions.to(wide)[:, None, None] / theta**exponents  # [T, 1, D/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of every head of x [T, heads, D] by their angles (half-split form)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Linear(nn.Linear):
    """y = x W^T.

    Its weight is not drawn, since a checkpoint or `initialise` fills it: drawing on the meta device imports 70 MB of torch for nothing.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm over the head size on q and k before the rotation."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], sequences: Sequences, cache_layer: CacheLayer | None = None) -> Tensor:
        heads = (len(x), -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), *angles)  # [T, H, D]
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), *angles)  # [T, K, D]
        v = self.v_proj(x).view(heads)  # [T, K, D]
        return self.o_proj(attention(q, k, v, sequences, cache_layer).flatten(1))  # [T, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor], sequences: Sequences, cache_layer: CacheLayer | None = None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles, sequences, cache_layer)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """The layers between the embedding and the head; its name in a checkpoint is `model`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """A dense Qwen3 with its head.

    Built with `torch.device("meta")` and filled by `harkd.load_model`, or drawn at random by `initialise`.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [V, C]: the embedding itself where the config ties them."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden(self, ids: Tensor, positions: Tensor, sequences: Sequences, cache: Cache | None = None) -> Tensor:
        """The stream behind the final norm, [T, C], of packed tokens.

        Args: ids [T] int64; positions [T], each token's place behind its prefix and past; sequences: who sees whom; cache: where keys and
        values are kept.
        """
        config = self.config
        hidden = self.model.embed_tokens(ids)  # [T, C]
        angles = rotary(positions, config.head_dim, config.rope_theta, hidden.dtype)
        for i, layer in enumerate(self.model.layers):
            hidden = layer(hidden, angles, sequences, None if cache is None else cache.layers[i])
        return self.model.norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] in float32 (float64 for float64 weights) of rows [N, C]; the product itself runs in the weights' dtype."""
        logits = F.linear(hidden, self.head_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [T, V] in float32 of one sequence ids [T]. Raises UserError where there are none."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if not len(ids):
            raise UserError("there are no ids to give logits of")
        positions = torch.arange(len(ids), device=ids.device)
        return self.head(self.hidden(ids, positions, Sequences.packed([len(ids)], device=ids.device)))

    def nll(self, hidden: Tensor, targets: Tensor, vocab_size: int | None = None, chunk: int = 512) -> Tensor:
        """-log p(target) [N] in float32 of rows hidden [N, C] and targets [N], a chunk of rows at a time; ids from `vocab_size` on get no
        probability.
        """
        return cross_entropy(hidden, self.head_weight, targets, vocab_size, chunk)


def initialise(model: Qwen3, seed: int, std: float = 0.02) -> Qwen3:
    """Fill a model with seeded normal weights (norms with ones), in place: for tests and for training from nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                draw = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(draw.normal_(0.0, std, generator=generator))
    return model
