"""kernels.packed_attention in Triton's interpreter, against the reference in float64; its lists of work; what compiles for which GPU."""

import random
from functools import partial

import pytest
import torch

from harkd.kernels import packed_attention
from harkd.kernels.attention import Sequences, attention
from harkd.kernels.tiles import ANY, TILES, Tile, tile_for
from tests.exactness import assert_as_exact, results
from tests.kernel_cases import TARGETS, Case, assert_compiles, each_target
from tests.test_attention import Case as Pack
from tests.test_attention import draw, plan

KERNELS = ("packed_forward", "packed_backward_rows", "packed_backward_keys")
PREFIX = Pack([(37, 0, -1), (20, 0, 0), (1, 0, 0), (0, 0, -1), (19, 0, 0), (9, 0, -1)], [(37, 0)])
TWO = Pack([(3, 0, 1), (18, 0, -1), (21, 0, -1), (5, 0, 0), (20, 0, 1), (0, 0, 1), (4, 0, -1)], [(18, 1), (21, 2)])


@pytest.fixture
def small(monkeypatch):
    """Tiles and ranges so small that a short pack has many of them, with ragged ends."""
    for kernel in KERNELS:
        monkeypatch.setitem(TILES, (kernel, 16, ANY), Tile(m=16, n=32) if "rows" in kernel else Tile(m=32, n=16))
    monkeypatch.setattr(packed_attention, "RANGE", 24)


def inputs(pack, heads, kv_heads, dim, dtype):
    return [x.requires_grad_() for x in draw(pack, heads, kv_heads, dim, dtype=dtype)]


def check(pack, heads, kv_heads, dim, dtype, backward=True):
    reference, kernel = (partial(attention, sequences=plan(pack), backend=backend) for backend in ("torch", "triton"))
    assert_as_exact(kernel, reference, [x.requires_grad_(backward) for x in inputs(pack, heads, kv_heads, dim, dtype)])


@pytest.mark.parametrize("pack", [PREFIX, TWO], ids=["one prefix", "two prefixes"])
def test_many_tiles(pack, small):
    check(pack, 2, 1, 16, torch.float32)


@pytest.mark.parametrize(
    "pack, heads, kv_heads, dim, dtype, backward",
    [
        (Pack([(5, 0, -1), (0, 0, -1), (1, 0, -1), (67, 0, -1)], []), 4, 2, 128, torch.float16, True),
        (Pack([(70, 0, -1), (9, 0, 0)], [(70, 0)]), 2, 1, 64, torch.float16, True),
        (Pack([(7, 0, -1)], []), 16, 8, 128, torch.float16, True),
        (Pack([(5, 0, -1)], []), 8, 1, 128, torch.float16, True),
        (Pack([(5, 0, -1)], []), 32, 8, 64, torch.float32, False),
        (Pack([(3, 0, -1)], []), 64, 8, 128, torch.float16, False),
    ],
)
def test_shipped_tiles(pack, heads, kv_heads, dim, dtype, backward):
    check(pack, heads, kv_heads, dim, dtype, backward)


def test_nobody_reads_what_it_does_not_see(small):
    """Keys, values and gradients that are NaN in one sequence stay there."""
    pack = Pack([(20, 0, -1), (7, 0, -1), (25, 0, 0)], [(20, 0)])
    q, k, v = inputs(pack, 2, 1, 16, torch.float32)
    clean = results(partial(attention, sequences=plan(pack), backend="triton"), [q, k, v])
    spoiled = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    for x in spoiled:
        x.data[20:27] = float("nan")
    for right, wrong in zip(clean, results(partial(attention, sequences=plan(pack), backend="triton"), spoiled), strict=True):
        assert wrong[20:27].isnan().any()
        wrong[20:27] = right[20:27]
        assert torch.equal(right, wrong)


def test_nobody_reads_the_tiles_of_its_future(small):
    """70 tokens, of which the last six lie on a tile of keys of their own and are NaN: no row before them is touched."""
    pack = Pack([(70, 0, -1)], [])
    q, k, v = inputs(pack, 2, 1, 16, torch.float32)
    k.data[64:], v.data[64:] = float("nan"), float("nan")
    out = attention(q, k, v, plan(pack), backend="triton")
    out[:64].square().sum().backward()
    assert out[64:].isnan().all() and out[:64].isfinite().all() and q.grad[:64].isfinite().all() and q.grad[63].abs().min() > 0


def test_heads_that_make_no_groups():
    q, k = torch.randn(3, 4, 16), torch.randn(3, 3, 16)
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
            attention(q, k, k, Sequences.packed([3]), backend=backend)


def test_views_and_no_tokens():
    pack = Pack([(9, 0, -1)], [])
    joined = draw(pack, 4, 1, 16, dtype=torch.float32)[0]
    q, k, v = joined[:, :2], joined[:, 2:3], joined[:, 3:]
    ours, plain = (attention(q, k, v, plan(pack), backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, plain)
    assert attention(q[:0], k[:0], v[:0], Sequences.packed([0, 0]), backend="triton").shape == (0, 2, 16)


def test_large_scores():
    """Scores in the hundreds: 2^score overflows, the softmax does not."""
    pack = Pack([(20, 0, -1)], [])
    q, k, v = draw(pack, 1, 1, 16, dtype=torch.float32)
    functions = (partial(attention, sequences=plan(pack), backend=backend) for backend in ("triton", "torch"))
    ours, plain = (results(function, [100 * q, k.requires_grad_(), v]) for function in functions)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def random_pack(seed):
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, rng.randint(2, 50)]) for _ in range(rng.randint(1, 8))]
    hosts = [s for s, length in enumerate(lengths) if length and rng.random() < 0.4]
    prefix_of = [-1 if s in hosts else rng.randint(-1, len(hosts) - 1) for s in range(len(lengths))]
    return Pack([(n, 0, g) for n, g in zip(lengths, prefix_of, strict=True)], [(lengths[s], s) for s in hosts])


@pytest.mark.parametrize("seed", range(40))
def test_the_lists_of_work_cover_the_mask_once(seed, monkeypatch):
    monkeypatch.setattr(packed_attention, "RANGE", 16)
    pack, (m, n) = random_pack(seed), random.Random(seed).choice([(16, 16), (8, 32), (32, 8)])
    mask, sequences = pack.mask(), plan(pack)
    by_rows, by_keys = torch.zeros(mask.shape, dtype=torch.int), torch.zeros(mask.shape, dtype=torch.int)
    for row, end, begin, start, length in packed_attention._row_items(sequences, m):
        for i in range(row, min(row + m, end)):
            by_rows[i, start : start + length] += 1
            by_rows[i, begin : i + 1] += 1
    items, sums = packed_attention._key_items(sequences, n)
    written = []
    for key, stop, first, end, causal, part in items:
        for j in range(key, min(key + n, stop)):
            by_keys[max(first, j) if causal else first : end, j] += 1
            written.append(j if part < 0 else ("part", part + j - key))
    assert torch.equal(by_rows, mask.int()) and torch.equal(by_keys, mask.int())
    assert all(end - first <= 16 for _, _, first, end, causal, _ in items if not causal)
    summed = {("part", part + i * (end - begin) + j) for begin, end, part, parts in sums for i in range(parts) for j in range(end - begin)}
    whole = set(range(len(mask))) - {j for begin, end, _, _ in sums for j in range(begin, end)}
    assert len(written) == len(set(written)) and set(written) == summed | whole


def test_layers_share_the_work(small, monkeypatch):
    pack = Pack([(9, 0, -1), (5, 0, 0)], [(9, 0)])
    sequences, pack = plan(pack), inputs(pack, 1, 1, 16, torch.float32)
    first = attention(*pack, sequences, backend="triton")
    first.sum().backward()
    made = dict(sequences.work)
    for name in ("_row_items", "_key_items"):
        monkeypatch.delattr(packed_attention, name)  # making a list again would fail
    second = attention(*pack, sequences, backend="triton")
    second.sum().backward()
    assert torch.equal(first, second) and sequences.work == made and {kind for kind, _ in made} == {"rows", "keys"}


def test_who_is_served():
    q = torch.randn(3, 2, 24)
    with pytest.raises(ValueError, match="head_dim"):
        attention(q, q, q, Sequences.packed([3]), backend="triton")
    auto, plain = (attention(q, q, q, Sequences.packed([3]), backend=backend) for backend in ("auto", "torch"))
    assert torch.equal(auto, plain)
    q = torch.randn(5, 2, 16, requires_grad=True)
    inside = Sequences.packed([4, 1], [-1, 0], [2], [0])  # the prefix is a part of a sequence
    with pytest.raises(ValueError, match="not a sequence of the pack"):
        attention(q, q, q, inside, backend="triton").sum().backward()


def case(kernel, dim, gpu, targets):
    tile = tile_for("packed" + kernel, dim, gpu)
    names = {"_forward": "q k v out", "_backward_rows": "q k v dout dq", "_backward_keys": "q k v dout dk dv"}[kernel]
    floats = {"_forward": "lse", "_backward_rows": "lse delta", "_backward_keys": "lse delta dk_parts dv_parts"}[kernel]
    signature = {f"{name}_ptr": "*bf16" for name in names.split()} | {f"{name}_ptr": "*fp32" for name in floats.split()}
    signature |= {"items_ptr": "*i32", "tokens": "i32", "scale": "fp32"} | ({} if kernel == "_forward" else {"norm": "fp32"})
    constants = {"HEADS": 16, "GROUP": 2, "D": dim, "M": tile.m, "N": tile.n}
    return Case(f"harkd.kernels.packed_attention:{kernel}", signature, constants, tile.warps, tile.stages, True, targets)


@each_target
def test_kernels_compile(target):
    kernels, families = ("_forward", "_backward_rows", "_backward_keys"), {"sm_80": ANY, "sm_90": "sm90", "sm_100": ANY, "gfx942": "gfx942"}
    assert set(families) == set(TARGETS)
    cases = [case(kernel, dim, families[target], (target,)) for kernel in kernels for dim in (64, 128)]
    delta = {"out_ptr": "*bf16", "dout_ptr": "*bf16", "delta_ptr": "*fp32", "tokens": "i32"}
    assert_compiles([*cases, Case("harkd.kernels.packed_attention:_delta", delta, {"HEADS": 16, "D": 128, "M": 64})], target)
