"""kernels.attention and, over a cache on a CPU, kernels.grouped_attention against a dense softmax in float64 whose mask is written out from the
definition."""

import random
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from harkd.kernels.attention import CacheLayer, Sequences, attention


@dataclass
class Case:
    """Sequences as (new tokens, past tokens, prefix or -1); prefixes as (length, its sequence in the pack, or -1: it lies in the cache)."""

    sequences: list[tuple[int, int, int]]
    prefixes: list[tuple[int, int]]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(new for new, _, _ in self.sequences)]

    def mask(self) -> torch.Tensor:
        """[T, J]: token i sees key j. Keys: the T new ones, then every sequence's past, then the prefixes in the cache."""
        owners = [(s, past + i) for s, (new, past, _) in enumerate(self.sequences) for i in range(new)]
        keys = list(owners)
        keys += [(s, i) for s, (_, past, _) in enumerate(self.sequences) for i in range(past)]
        keys += [(("prefix", g), i) for g, (length, where) in enumerate(self.prefixes) if where < 0 for i in range(length)]
        rows = []
        for s, place in owners:
            g = self.sequences[s][2]
            shared = None if g < 0 else ("prefix", g) if self.prefixes[g][1] < 0 else self.prefixes[g][1]
            rows.append([owner == shared or (owner == s and key_place <= place) for owner, key_place in keys])
        return torch.tensor(rows, dtype=torch.bool).view(len(owners), len(keys))


def draw(case: Case, heads: int, kv_heads: int, dim: int, seed: int = 0, dtype=torch.float64):
    """q [T, H, D], and k, v [J, K, D] of all keys that the mask names."""
    generator = torch.Generator().manual_seed(seed)
    tokens, keys = case.mask().shape
    shapes = (tokens, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q, k, v, mask):
    """Softmax over the keys that the mask allows, [T, H, D] in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,jhd->htj", q, k) / q.shape[2] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("htj,jhd->thd", weights, v)


def plan(case: Case) -> Sequences:
    return Sequences.packed(
        [new for new, _, _ in case.sequences],
        [prefix for _, _, prefix in case.sequences],
        [length for length, _ in case.prefixes],
        [case.starts[s] for _, s in case.prefixes],
    )


def cached_plan(case: Case, k, v, page: int, seed: int):
    """The plan over a paged cache with scrambled pages that holds pasts and prefixes; what nobody may read is NaN."""
    rng = random.Random(seed)
    needs = [-(-(new + past) // page) for new, past, _ in case.sequences] + [-(-length // page) for length, _ in case.prefixes]
    pages = rng.sample(range(sum(needs) + 5), sum(needs))
    tables, width = [], max(needs)
    for need in needs:
        tables.append([pages.pop() for _ in range(need)])
    layer = CacheLayer(*(torch.full((sum(needs) + 5, page, *k.shape[1:]), float("nan"), dtype=k.dtype) for _ in range(2)))
    row = case.starts[-1]  # the pasts follow the new tokens among the keys, then the prefixes in the cache
    lengths = [past for _, past, _ in case.sequences] + [length if where < 0 else 0 for length, where in case.prefixes]
    for table, length in zip(tables, lengths, strict=True):
        for i in range(length):
            layer.keys[table[i // page], i % page] = k[row]
            layer.values[table[i // page], i % page] = v[row]
            row += 1
    count = len(case.sequences)
    tables[count:] = [tables[s if s >= 0 else count + g] for g, (_, s) in enumerate(case.prefixes)]  # those of a prefix in the pack
    places = [(tables[s], past + i) for s, (new, past, _) in enumerate(case.sequences) for i in range(new)]
    padded = torch.tensor([table + [-1] * (width - len(table)) for table in tables], dtype=torch.int32)
    ints = partial(torch.tensor, dtype=torch.int32)
    sequences = Sequences(
        cu_q=ints(case.starts),
        past=ints([past for _, past, _ in case.sequences]),
        prefix_of=ints([prefix for _, _, prefix in case.sequences]),
        prefix_len=ints([length for length, _ in case.prefixes]),
        prefix_start=ints([-1] * len(case.prefixes)),
        max_q=max(new for new, _, _ in case.sequences),
        max_k=4096,
        max_prefix=4096,
        block_table=padded[:count],
        prefix_table=padded[count:],
        slots=torch.tensor([table[i // page] * page + i % page for table, i in places], dtype=torch.int64),
    )
    return sequences, layer


def close(left, right, tolerance=1e-12) -> bool:
    return left.shape == right.shape and bool((left.double() - right.double()).abs().max() < tolerance)


def rms(x, truth) -> torch.Tensor:
    return (x.detach().double() - truth.detach()).square().mean().sqrt()


PACKS = {
    "one token": Case([(1, 0, -1)], []),
    "one sequence": Case([(9, 0, -1)], []),
    "ragged, empty ones among them": Case([(5, 0, -1), (0, 0, -1), (1, 0, -1), (12, 0, -1), (0, 0, -1)], []),
    "prefix and examples": Case([(7, 0, -1), (4, 0, 0), (1, 0, 0), (9, 0, 0)], [(7, 0)]),
    "two prefixes, examples mixed": Case(
        [(3, 0, -1), (2, 0, 0), (6, 0, -1), (5, 0, 1), (1, 0, 0), (0, 0, 1), (4, 0, -1)], [(3, 0), (6, 2)]
    ),
    "prefix behind its examples": Case([(4, 0, 0), (5, 0, -1)], [(5, 1)]),
    "prefix of nothing": Case([(0, 0, -1), (4, 0, 0)], [(0, 0)]),
}
CACHED = {
    "prefill": Case([(11, 0, -1)], []),
    "decode": Case([(1, 13, -1), (1, 1, -1), (1, 8, -1)], []),
    "decode behind a shared prefix": Case([(1, 6, 0), (1, 9, 0), (1, 0, 0)], [(10, -1)]),
    "stretches, an empty one, two prefixes": Case([(5, 3, 0), (0, 0, -1), (4, 0, 1), (1, 17, -1), (3, 8, 1)], [(9, -1), (1, -1)]),
    "prefix stored by the step, pasts in the cache": Case([(6, 0, -1), (4, 3, 0), (2, 0, 0), (1, 5, 1)], [(6, 0), (4, -1)]),
}
CPU = pytest.mark.parametrize("backend", ["auto", "torch"])  # "auto" takes merged_attention, and grouped_attention over the cache
HEADS = [(4, 2), (16, 8), (32, 8), (64, 8), (6, 1), (3, 3)]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("name", PACKS)
@CPU
def test_packs(name, heads, kv_heads, backend):
    case = PACKS[name]
    q, k, v = draw(case, heads, kv_heads, 16)
    truth = dense(q, k, v, case.mask())
    out = attention(q, k, v, plan(case), None, backend)
    assert close(out, truth)
    assert not close(torch.zeros_like(out), truth)
    assert not close(out + 1e-6 * torch.randn_like(out), truth)


@pytest.mark.parametrize("page", [1, 4, 32])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (64, 8)])
@pytest.mark.parametrize("name", CACHED)
@CPU
def test_cache_in_scrambled_pages(name, heads, kv_heads, page, backend):
    case = CACHED[name]
    q, k, v = draw(case, heads, kv_heads, 8, seed=1)
    sequences, layer = cached_plan(case, k, v, page, seed=page)
    before = layer.keys.clone()
    tokens = len(q)
    truth = dense(q, k, v, case.mask())
    out = attention(q, k[:tokens], v[:tokens], sequences, layer, backend)
    assert close(out, truth) and not close(out.flip(-1), truth)
    stored = layer.keys.flatten(0, 1)[sequences.slots], layer.values.flatten(0, 1)[sequences.slots]
    assert torch.equal(stored[0], k[:tokens]) and torch.equal(stored[1], v[:tokens])
    layer.keys.flatten(0, 1)[sequences.slots] = before.flatten(0, 1)[sequences.slots]
    assert torch.equal(layer.keys.nan_to_num(7), before.nan_to_num(7)), "a slot of somebody else's was written"


@pytest.mark.parametrize("seed", range(20))
@CPU
def test_random_plans(seed, backend, monkeypatch):
    monkeypatch.setattr("harkd.kernels.grouped_attention.BLOCK", 1 + seed % 7)  # blocks that end inside a sequence
    rng = random.Random(seed)
    prefixes = [(rng.randint(0, 9), -1) for _ in range(rng.randint(0, 3))]
    sequences = [(rng.randint(0, 7), rng.randint(0, 12), rng.randint(-1, len(prefixes) - 1)) for _ in range(rng.randint(1, 6))]
    case = Case([*sequences, (1, 2, -1)], prefixes)
    q, k, v = draw(case, 6, 3, 4, seed)
    plan_, layer = cached_plan(case, k, v, rng.choice([1, 2, 3, 16]), seed)
    assert close(attention(q, k[: len(q)], v[: len(q)], plan_, layer, backend), dense(q, k, v, case.mask()))


def test_the_truth_tells_masks_apart():
    """Every way to see too much or too little gives other numbers, so that the tests above can fail."""
    case = PACKS["two prefixes, examples mixed"]
    q, k, v = draw(case, 4, 2, 16)
    out, mask = attention(q, k, v, plan(case)), case.mask()
    wrong_prefix = Case([(n, past, 1 - g if g >= 0 else g) for n, past, g in case.sequences], case.prefixes).mask()
    no_prefix = Case([(n, past, -1) for n, past, _ in case.sequences], []).mask()
    everything_before = torch.ones_like(mask).tril()
    for wrong in (wrong_prefix, no_prefix, everything_before, torch.ones_like(mask)):
        assert not close(out, dense(q, k, v, wrong), 1e-3)


def test_no_tokens():
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    assert attention(q, k, k, Sequences.packed([0, 0])).shape == (0, 4, 8)


@CPU
def test_gradients(backend):
    small = Case([(2, 0, -1), (2, 0, 0), (1, 0, 0)], [(2, 0)])
    inputs = [x.requires_grad_() for x in draw(small, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, plan(small), None, backend), inputs)
    for case in PACKS.values():
        sequences, inputs = plan(case), [x.requires_grad_() for x in draw(case, 4, 2, 2)]
        upstream = torch.randn(len(inputs[0]), 4, 2, dtype=torch.float64)
        ours = torch.autograd.grad((attention(*inputs, sequences, None, backend) * upstream).sum(), inputs)
        truth = torch.autograd.grad((dense(*inputs, case.mask()) * upstream).sum(), inputs)
        for left, right in zip(ours, truth, strict=True):
            assert close(left, right) and not close(left + 1e-6 * torch.randn_like(left), right)


@pytest.mark.parametrize("chunks", [[20], [7, 13], [1] * 20, [16, 1, 3]])
@CPU
def test_chunked_prefill_equals_one_shot(chunks, backend):
    case = Case([(20, 0, 0)], [(6, -1)])
    q, k, v = draw(case, 4, 2, 8, seed=2)
    whole, layer = cached_plan(case, k, v, 4, seed=9)
    out, past = [], 0
    for new in chunks:
        rows = slice(past, past + new)
        cu_q, pasts = (torch.tensor(x, dtype=torch.int32) for x in ([0, new], [past]))
        step = replace(whole, cu_q=cu_q, past=pasts, slots=whole.slots[rows], max_q=new)
        out.append(attention(q[rows], k[rows], v[rows], step, layer, backend))
        past += new
    assert close(torch.cat(out), dense(q, k, v, case.mask()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_half_precision_is_as_exact_as_torch(dtype, dim):
    case = Case([(30, 0, -1), (20, 0, 0), (30, 0, 0), (1, 0, 0)], [(30, 0)])
    mask, ratios = case.mask(), []
    for seed in range(5):
        q, k, v = draw(case, 8, 4, dim, seed, dtype)
        truth, out = dense(q, k, v, mask), attention(q, k, v, plan(case))
        assert out.dtype == dtype
        peer = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask[None, None], enable_gqa=True)
        errors = [rms(x, truth) for x in (out, peer[0].transpose(0, 1), torch.zeros_like(out))]
        ratios.append(errors[0] / errors[1])
        assert errors[2] > 20 * errors[0]
    assert sorted(ratios)[2] <= 2, f"error {sorted(ratios)[2]:.2f} x that of torch's attention"
    print(f"{dtype} D={dim}: {sorted(ratios)[2]:.2f} x torch's error")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [1, 5, 30])
def test_short_examples_behind_a_long_prefix_are_as_exact(dtype, own):
    """What a few own tokens give is much larger than what is left of it behind a prefix: rounding it, or its weight, would show."""
    case, ratios = Case([(300, 0, -1)] + [(own, 0, 0)] * 20, [(300, 0)]), []
    for seed in range(3):
        inputs, upstream = [x.requires_grad_() for x in draw(case, 4, 2, 64, seed, dtype)], torch.randn(300 + 20 * own, 4, 64).to(dtype)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        outs = dense(*wide, case.mask()), *(attention(*inputs, plan(case), None, backend) for backend in ("auto", "torch"))
        made = [[out[300:], *torch.autograd.grad(out, x, upstream.to(out.dtype))] for out, x in zip(outs, (wide, inputs, inputs), strict=True)]
        ratios.append([float(rms(mine, exact) / rms(theirs, exact)) for exact, mine, theirs in zip(*made, strict=True)])
    worst = [sorted(of)[1] for of in zip(*ratios, strict=True)]
    assert max(worst) <= 1.6, f"out, dq, dk, dv: {worst} x the error of the reference"


def eager(q, k, v, mask):
    """Attention as Hugging Face's eager one rounds it: scores and probabilities in the inputs' dtype, [T, H, D]."""
    q, k, v = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0) for x in (k, v))
    scores = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("new", [1, 9])
def test_grouped_attention_is_as_exact_as_eager(dtype, new):
    """Single tokens and stretches over the cache, behind two prefixes and none, an empty sequence among them."""
    case = Case([(new, 40, 0), (new, 7, 0), (0, 3, 1), (new, 25, 1), (new, 60, -1)], [(50, -1), (3, -1)])
    mask, ratios = case.mask(), []
    for seed in range(7):
        q, k, v = draw(case, 16, 8, 128, seed, dtype)
        sequences, layer = cached_plan(case, k, v, 16, seed)
        tokens, truth = len(q), dense(q, k, v, mask)
        out = attention(q, k[:tokens], v[:tokens], sequences, layer)
        assert out.dtype == dtype
        wrong = out.clone()
        wrong[-1, -1, -1] += 0.2
        errors = [rms(x, truth) for x in (out, eager(q, k, v, mask), torch.zeros_like(out))]
        largest = [(x.double() - truth).abs().max() for x in (out, wrong)]
        assert errors[2] > 20 * errors[0] and largest[0] < 0.1 < largest[1]
        ratios.append(errors[0] / errors[1])
    print(f"{dtype}, {new} new: {sorted(ratios)[3]:.2f} x the error of eager attention")
    assert sorted(ratios)[3] <= 1.25


def test_the_plan_of_a_pack():
    sequences = Sequences.packed([7, 4, 0, 9], [-1, 0, -1, 0], [7], [0])
    assert sequences.cu_q.tolist() == [0, 7, 11, 11, 20] and sequences.past.tolist() == [0, 0, 0, 0]
    assert (sequences.max_q, sequences.max_k, sequences.max_prefix) == (9, 9, 7)
    for name in ("cu_q", "past", "prefix_of", "prefix_len", "prefix_start"):
        assert getattr(sequences, name).dtype == torch.int32
