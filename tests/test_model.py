"""The model against transformers on random tiny configs, and against itself packed, permuted and cached."""

import json
import math
import re
from statistics import median

import pytest
import torch

from harkd.errors import UserError
from harkd.kernels.attention import Sequences
from harkd.qwen3.cache import Cache
from harkd.qwen3.config import check_config
from harkd.qwen3.model import Qwen3
from tests.helpers import QWEN3, needs_qwen3
from tests.tiny import random_model, tiny_config, tiny_model, transformers_model

SHAPES = [
    {},
    {"tie_word_embeddings": True, "num_hidden_layers": 1, "rope_theta": 1e4},
    {"head_dim": 64, "num_hidden_layers": 3, "rope_theta": 5e6, "rms_norm_eps": 1e-5},
    {"head_dim": 128, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    {"num_hidden_layers": 4, "head_dim": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 40, "rope_theta": 1e4},
]


def ids_of(seed: int, length: int, vocab: int = 384) -> torch.Tensor:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_equal_transformers(tmp_path, changes):
    pytest.importorskip("transformers")
    tiny_model(tmp_path, seed=3, **changes)
    ours, theirs = random_model(3, **changes), transformers_model(tmp_path)
    ids = ids_of(0, 70)
    with torch.no_grad():
        logits, truth = ours.logits(ids), theirs(ids[None]).logits[0]
    assert logits.dtype == torch.float32 and logits.shape == truth.shape and truth.std() > 0.3
    error = (logits - truth).abs().max()
    print(f"max error {error:.1e}, logits' spread {truth.std():.2f}")
    assert error < 1e-4
    for wrong in (torch.zeros_like(truth), truth.roll(1, 0), random_model(3, **{**changes, "rope_theta": 2e4}).logits(ids)):
        assert (wrong - truth).abs().max() > 1e-3


def test_rounding_is_that_of_transformers(tmp_path):
    """In bfloat16 the RMS error against a float64 copy is that of eager attention in transformers, in one go and for cached single tokens."""
    pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 128, "intermediate_size": 96, "dtype": "bfloat16"}
    tiny_model(tmp_path, **shape)
    theirs, exact = transformers_model(tmp_path, torch.bfloat16), transformers_model(tmp_path, torch.float64)
    ratios, cached = [], []
    for seed in range(20):
        ours, ids = random_model(seed, 0.12, **shape), ids_of(seed, 24)
        weights = ours.state_dict()
        theirs.load_state_dict(weights)
        exact.load_state_dict(weights)
        with torch.no_grad():
            truth = exact(ids[None]).logits[0]
            outs = ours.logits(ids), theirs(ids[None]).logits[0], cached_logits(ours, ids, (16, *[1] * 8))
        errors = [(x.double() - truth).square().mean().sqrt() for x in outs]
        single = [(x.double() - truth)[16:].square().mean().sqrt() for x in outs]
        assert errors[1] > 0 and truth.std() > 20 * errors[0]
        ratios.append(float(errors[0] / errors[1]))
        cached.append(float(single[2] / single[1]))
    print(f"RMS error {median(ratios):.3f} x that of transformers (median of 20 seeds, {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"of cached single tokens {median(cached):.3f} x")
    assert median(ratios) <= 1.1 and 0.5 < median(cached) <= 1.1


def wave_model() -> Qwen3:
    """Weights from a formula, so that no generator of random numbers plays a part."""
    model = Qwen3(tiny_config(vocab_size=20, rope_theta=1e4)).double()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * (0.7 + 0.013 * i) + i).view(parameter.shape)
            parameter.copy_(1 + 0.2 * wave if parameter.dim() == 1 else 0.3 * wave)
    return model


def test_golden_logits():
    """Numbers that transformers 5.23 gave in float64."""
    with torch.no_grad():
        logits = wave_model().logits(torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3]))
    assert logits.shape == (10, 20) and logits.dtype == torch.float64
    golden = {(0, 0): 0.108449, (1, 7): 0.560925, (4, 13): 0.325718, (6, 2): -0.094969, (8, 19): -0.218261, (9, 5): -0.106655}
    for (row, column), value in golden.items():
        assert math.isclose(logits[row, column], value, abs_tol=2e-5), (row, column, float(logits[row, column]))


def separate_and_packed(model, prefix, examples):
    """The summed loss of the examples' tokens and all gradients: each example behind its own copy of the prefix, and packed behind one."""

    def run(ids, positions, sequences, rows, targets):
        hidden = model.hidden(ids, positions, sequences)
        return model.nll(hidden[rows], targets, chunk=5).sum()

    def gradients(loss):
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    p = len(prefix)
    parts = []
    for example in examples:
        ids = torch.cat([prefix, example])
        rows = torch.arange(p, len(ids) - 1)
        parts.append(run(ids, torch.arange(len(ids)), Sequences.packed([len(ids)]), rows, ids[rows + 1]))
    ids = torch.cat([prefix, *examples])
    positions = torch.cat([torch.arange(p), *(p + torch.arange(len(e)) for e in examples)])
    sequences = Sequences.packed([p, *map(len, examples)], [-1] + [0] * len(examples), [p], [0])
    starts = [p + sum(map(len, examples[:i])) for i in range(len(examples))]
    rows = torch.cat([torch.arange(start, start + len(e) - 1) for start, e in zip(starts, examples, strict=True)])
    return gradients(sum(parts)), gradients(run(ids, positions, sequences, rows, ids[rows + 1]))


@pytest.mark.parametrize("tied", [False, True])
def test_packed_equals_separate(tied):
    model = random_model(1, dtype=torch.float64, tie_word_embeddings=tied)
    prefix, examples = ids_of(1, 11), [ids_of(2, 9), ids_of(3, 2), ids_of(4, 14)]
    separate, packed = separate_and_packed(model, prefix, examples)
    for left, right in zip(separate, packed, strict=True):
        assert left.abs().max() > 0 and (left - right).abs().max() < 1e-10
    _, other = separate_and_packed(model, prefix.flip(0), examples)
    assert all((left - right).abs().max() > 1e-6 for left, right in zip(separate, other, strict=True))


def test_order_of_a_pack_does_not_matter():
    model, lengths = random_model(1, dtype=torch.float64), [5, 1, 8, 0, 13]
    parts = [ids_of(i, n) for i, n in enumerate(lengths)]

    def hidden(order):
        ids, positions = torch.cat([parts[i] for i in order]), torch.cat([torch.arange(lengths[i]) for i in order])
        out = model.hidden(ids, positions, Sequences.packed([lengths[i] for i in order])).split([lengths[i] for i in order])
        return dict(zip(order, out, strict=True))

    with torch.no_grad():
        left, right = hidden([0, 1, 2, 3, 4]), hidden([4, 2, 3, 0, 1])
        alone = {i: model.hidden(part, torch.arange(len(part)), Sequences.packed([len(part)])) for i, part in enumerate(parts) if len(part)}
    for i, truth in alone.items():
        torch.testing.assert_close(left[i], truth, rtol=0, atol=1e-12)
        torch.testing.assert_close(right[i], truth, rtol=0, atol=1e-12)


def cached_logits(model, ids, stretches):
    """Logits of one sequence that goes through the cache in stretches."""
    cache = Cache(model.config, 9, 4, model.dtype, model.device)
    cache.allocate(1)
    table, past, out = list(reversed(cache.allocate(len(ids)))), 0, []
    for new in stretches:
        places = range(past, past + new)
        ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, new], [past], [-1], [], [], [table])]
        slots = torch.tensor([cache.slot(table, i) for i in places])
        sequences = Sequences(*ints[:5], new, past + new, 0, block_table=ints[5], slots=slots)
        with torch.no_grad():
            out.append(model.head(model.hidden(ids[past : past + new], torch.tensor(places), sequences, cache)))
        past += new
    return torch.cat(out)


def test_cached_equals_uncached():
    """A prompt in two stretches and a few single tokens through the cache."""
    model, ids = random_model(5, dtype=torch.float64), ids_of(9, 23)
    out, truth = cached_logits(model, ids, (9, 11, 1, 1, 1)), model.logits(ids)
    assert (out - truth).abs().max() < 1e-10 < (out.roll(1, 0) - truth).abs().max()


def test_the_cache_hands_out_each_page_once():
    cache = Cache(tiny_config(), 8, 4, torch.float32, "cpu")
    first, second = cache.allocate(9), cache.allocate(16)
    assert len(first) == 3 and len(second) == 4 and not {*first} & {*second}
    assert cache.allocate(5) is None and cache.allocate(4) is not None
    cache.release(first)
    third = cache.allocate(12)
    assert sorted(third) == sorted(first) and third == sorted(third), "pages that lie one behind the other"
    cache.release(second[1:2])
    cache.release(third[2:])
    assert cache.allocate(8) is not None and cache.allocate(1) is None and cache.allocate(0) == []


def test_nll_is_that_of_the_logits():
    for tied in (False, True):
        model, ids = random_model(2, tie_word_embeddings=tied), ids_of(0, 12)
        with torch.no_grad():
            hidden = model.hidden(ids, torch.arange(12), Sequences.packed([12]))
            nll = model.nll(hidden[:-1], ids[1:] % 350, vocab_size=350, chunk=4)
            truth = -model.logits(ids)[:-1, :350].log_softmax(-1).gather(1, (ids[1:] % 350)[:, None])[:, 0]
        torch.testing.assert_close(nll, truth, rtol=0, atol=2e-5)
        assert not torch.allclose(nll, truth.roll(1), atol=1e-2)


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="no ids"):
        random_model().logits([])
    with pytest.raises(UserError, match=f"no memory for a cache of {1 << 45} tokens"):
        Cache(tiny_config(), 1 << 40, 32, torch.float32, "cpu")


@needs_qwen3
def test_parameter_counts_of_the_published_models():
    table = dict(re.findall(r"\b([\d.]+B) ([\d,]{11,})", (QWEN3 / "README.md").read_text()))
    assert len(table) == 6
    configs = json.loads((QWEN3 / "configs.json").read_text())
    for size, count in table.items():
        with torch.device("meta"):
            model = Qwen3(check_config(configs[f"Qwen3-{size}"], size))
        assert sum(p.numel() for p in model.parameters()) == int(count.replace(",", "")), size
