"""Qwen3, dense (0.6B to 32B) or with experts (30B-A3B, 235B-A22B: qwen3/mlp.py), over packed tokens.

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

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harkd.distributed import World
from harkd.errors import UserError
from harkd.kernels.attention import CacheLayer, Sequences, attention
from harkd.kernels.loss import cross_entropy, logits_of
from harkd.kernels.rms_norm import add_rms_norm, rms_norm
from harkd.kernels.rope import norm_rope, rotary
from harkd.qwen3.cache import Cache
from harkd.qwen3.config import Qwen3Config, Qwen3MoeConfig
from harkd.qwen3.linear import Linear, project
from harkd.qwen3.mlp import MLP, Experts


class RMSNorm(nn.Module):
    """The weight of a norm over the last axis: kernels/rms_norm.py."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        return rms_norm(x, self.weight, self.eps, backend)

    def add(self, hidden: Tensor, update: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """hidden + update, and its norm."""
        return add_rms_norm(hidden, update, self.weight, self.eps, backend)


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

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], sequences: Sequences, cache_layer: CacheLayer | None, backend: str
    ) -> Tensor:
        projected = project(x, (self.q_proj, self.k_proj, self.v_proj), backend)
        q, k, v = (y.view(len(x), y.shape[1] // self.head_dim, self.head_dim) for y in projected)  # [T, H, D], [T, K, D], [T, K, D]
        q, k = norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, *angles, self.q_norm.eps, backend)
        out = attention(q, k, v, sequences, cache_layer, backend)  # [T, H, D]
        return project(out.flatten(1), [self.o_proj], backend)[0]  # [T, C]


class Layer(nn.Module):
    """One decoder layer's parts: attention and MLP or experts, each with the norm before it."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        experts = isinstance(config, Qwen3MoeConfig)
        self.mlp = Experts(config) if experts else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The layers between the embedding and the head; its name in a checkpoint is `model`."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """A Qwen3 with its head.

    Built with `torch.device("meta")` and filled by `harkd.load_model`, or drawn at random by `initialise`. `group`: the processes that hold
    one model together, each the part that `config` gives the sizes of (qwen3/parallel.py).
    """

    def __init__(self, config: Qwen3Config, group: World = World()) -> None:
        super().__init__()
        self.config, self.group = config, group
        self.backend = "auto"  # of all kernels: see kernels/backend.py
        self.checkpoint_activations = False  # keep only what runs between the layers, and compute each layer again in the backward pass
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
        config, layers, backend = self.config, self.model.layers, self.backend
        again = self.checkpoint_activations and torch.is_grad_enabled()
        hidden = self.model.embed_tokens(ids)  # [T, C]
        angles = rotary(positions, config.head_dim, config.rope_theta, hidden.dtype)
        with torch.cuda.device_of(hidden):  # where Triton starts its kernels: of several GPUs it may not be the first
            x = layers[0].input_layernorm(hidden, backend)
            for i, layer in enumerate(layers):
                cache_layer = None if cache is None else cache.layers[i]
                following = layers[i + 1].input_layernorm if i + 1 < len(layers) else self.model.norm
                parts = (layer, following, hidden, x, angles, sequences, cache_layer, self.group, backend)
                hidden, x = checkpoint(_layer, *parts, use_reentrant=False, preserve_rng_state=False) if again else _layer(*parts)
        return x

    def head(self, hidden: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """Logits [N, V] in float32 (float64 for float64 weights) of rows [N, C], or those of some ids alone.

        The product itself runs in the weights' dtype.
        """
        return logits_of(hidden, self.head_weight if ids is None else self.head_weight[ids])

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [T, V] in float32 of one sequence ids [T]. Raises UserError where there are none."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if not len(ids):
            raise UserError("there are no ids to give logits of")
        positions = torch.arange(len(ids), device=ids.device)
        return self.head(self.hidden(ids, positions, Sequences.packed([len(ids)], device=ids.device)))

    def nll(self, hidden: Tensor, targets: Tensor, vocab_size: int | None = None, chunk: int | None = None) -> Tensor:
        """-log p(target) [N] in float32 of rows hidden [N, C] and targets [N], a chunk of rows at a time; ids from `vocab_size` on get no
        probability.
        """
        return cross_entropy(hidden, self.head_weight, targets, vocab_size, chunk)


def _layer(
    layer: Layer, following: RMSNorm, hidden: Tensor, x: Tensor, angles: tuple[Tensor, Tensor], sequences: Sequences,
    cache_layer: CacheLayer | None, group: World, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer: the stream [T, C] and its norm x. What a part adds is added where the stream is normed for the next part."""
    update = group.add(layer.self_attn(x, angles, sequences, cache_layer, backend))  # what each process has of it, summed
    hidden, x = layer.post_attention_layernorm.add(hidden, update, backend)
    return following.add(hidden, group.add(layer.mlp(x, backend)), backend)


def initialise(model: Qwen3, seed: int, std: float = 0.02) -> Qwen3:
    """Fill a model with seeded normal weights (norms with ones), in place: for tests and for training from nothing."""
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                draw = torch.empty(parameter.shape, dtype=torch.float32, device=model.device)
                parameter.copy_(draw.normal_(0.0, std, generator=generator))
    return model
