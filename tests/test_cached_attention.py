"""kernels.cached_attention in Triton's interpreter, against the reference in float64; what compiles for which GPU."""

import random
from dataclasses import replace

import pytest
import torch

from harkd.kernels.attention import CacheLayer, Sequences, attention
from harkd.kernels.cached_attention import CLASSES, JOINED, cached_attention, store
from harkd.kernels.tiles import ANY, TILES, Tile, tile_for
from tests.exactness import assert_as_exact
from tests.kernel_cases import TARGETS, Case, assert_compiles, each_target
from tests.test_attention import CACHED, cached_plan, draw
from tests.test_attention import Case as Batch

# decoding, a stretch and a chunk side by side; keys of several splits, a prefix that ends inside a tile, an empty sequence
MIXED = Batch([(1, 75, 0), (0, 0, -1), (11, 30, 1), (33, 9, 0)], [(37, -1), (20, -1)])


@pytest.fixture
def small(monkeypatch):
    """Tiles and splits so small that a short sequence has many of them."""
    for rows, tile in zip(CLASSES, (Tile(m=16, n=16, k=32), Tile(m=64, n=16, k=48), Tile(m=32, n=32)), strict=True):
        monkeypatch.setitem(TILES, ("cached", rows, ANY), tile)
    monkeypatch.setitem(TILES, ("cached_prefix", 0, ANY), Tile(m=16, n=16, k=32))


def exact_plan(batch, k, v, page, seed=0):
    """The plan and the cache, with the number of keys as the generator gives it."""
    sequences, layer = cached_plan(batch, k, v, page, seed)
    most = max((length for length, _ in batch.prefixes), default=0)
    return replace(sequences, max_k=max(new + past for new, past, _ in batch.sequences), max_prefix=most), layer


def check(batch, heads, kv_heads, dim, dtype, page):
    def run(backend):
        def function(q, k, v):
            sequences, layer = exact_plan(batch, k, v, page)
            return attention(q, k[: len(q)], v[: len(q)], sequences, layer, backend)

        return function

    assert_as_exact(run("triton"), run("torch"), draw(batch, heads, kv_heads, dim, dtype=dtype))


@pytest.mark.parametrize(
    "batch, heads, kv_heads, dtype, page",
    [
        (MIXED, 2, 1, torch.float32, 4),
        (MIXED, 3, 1, torch.float16, 32),
        (CACHED["decode"], 20, 1, torch.float32, 4),  # more heads in a group than the smallest class has rows
        (Batch([(5, 30, 0), (3, 1, 0)], [(32, -1)]), 2, 1, torch.float32, 4),  # new tokens in two splits, a prefix that fills one
    ],
    ids=["mixed", "mixed in half precision", "one key head", "from split to split"],
)
def test_many_splits(batch, heads, kv_heads, dtype, page, small):
    check(batch, heads, kv_heads, 16, dtype, page)


@pytest.mark.parametrize(
    "batch, heads, kv_heads, dim",
    [
        (Batch([(1, 300, 0)], [(90, -1)]), 16, 8, 128),
        (Batch([(1, 20, -1)], []), 64, 8, 128),
        (Batch([(2, 30, 0)], [(9, -1)]), 32, 8, 64),
        (Batch([(40, 70, 0)], [(33, -1)]), 2, 1, 128),
        (Batch([(9, 600, 0)], [(33, -1)]), 4, 1, 64),
    ],
)
def test_shipped_tiles(batch, heads, kv_heads, dim):
    check(batch, heads, kv_heads, dim, torch.float16, 32)


def test_every_case_of_the_reference():
    for batch in CACHED.values():
        check(batch, 2, 1, 16, torch.float32, 2)


@pytest.mark.parametrize("seed", range(2))
def test_random_batches(seed, small):
    rng = random.Random(seed)
    prefixes = [(rng.randint(0, 40), -1) for _ in range(rng.randint(1, 3))]
    sequences = [(rng.choice([0, 1, 1, rng.randint(2, 70)]), rng.randint(0, 60), rng.randint(-1, len(prefixes) - 1)) for _ in range(3)]
    check(Batch([*sequences, (1, 2, 0)], prefixes), 2, 1, 16, torch.float32, rng.choice([1, 2, 16]))


@pytest.mark.parametrize("alone", [0, 2, 3])
def test_a_result_does_not_depend_on_its_batch(alone, small):
    """To the bit: alone, among others, on other pages, with larger bounds."""
    q, k, v = draw(MIXED, 2, 1, 16, dtype=torch.float16)
    sequences, layer = exact_plan(MIXED, k, v, 4)
    together = attention(q, k[: len(q)], v[: len(q)], sequences, layer, "triton")
    rows = slice(MIXED.starts[alone], MIXED.starts[alone + 1])
    one = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
    own = replace(
        sequences, cu_q=one, past=sequences.past[alone:][:1], prefix_of=sequences.prefix_of[alone:][:1], slots=sequences.slots[rows],
        block_table=sequences.block_table[alone:][:1], max_q=rows.stop - rows.start + 3, max_k=sequences.max_k + 100,
        max_prefix=sequences.max_prefix + 100,
    )  # fmt: skip
    by_itself = cached_attention(q[rows], own, layer)
    assert torch.equal(by_itself, together[rows]) and by_itself.any()
    moved = CacheLayer(*(x.flip(0) for x in layer))
    last = len(layer.keys) - 1
    moved_plan = replace(own, block_table=last - own.block_table, prefix_table=last - own.prefix_table)
    assert torch.equal(cached_attention(q[rows], moved_plan, moved), by_itself)
    wrong = own.block_table.clone()
    wrong[0, 0] = sequences.block_table[3 if alone == 2 else 2, 0]  # a page of another sequence
    assert not torch.equal(cached_attention(q[rows], replace(own, block_table=wrong), layer), by_itself)


def test_nothing_is_asked_of_the_host():
    """The plan's tensors are never read by Python, so decoding can be captured as a graph."""
    batch = CACHED["decode behind a shared prefix"]
    q, k, v = draw(batch, 2, 1, 16, dtype=torch.float32)
    sequences, layer = exact_plan(batch, k, v, 4)
    attention(q, k[: len(q)], v[: len(q)], sequences, layer, "triton")
    assert not {"spans", "tables", "prefixes"} & set(vars(sequences))


def test_store_writes_its_slots_and_no_others():
    joined = torch.randn(5, 8, 16)
    k, v = joined[:, 2:5], joined[:, 5:]  # views of a joined product
    layer = CacheLayer(*(torch.full((4, 2, 3, 16), float("nan")) for _ in range(2)))
    store(k, v, torch.tensor([6, -1, 0, 3, 7]), layer)
    for stored, new in zip(layer, (k, v), strict=True):
        expected = torch.full((8, 3, 16), float("nan"))
        expected[[6, 0, 3, 7]] = new[[0, 2, 3, 4]]
        assert torch.equal(stored.flatten(0, 1).nan_to_num(9), expected.nan_to_num(9))
    store(k[:0], v[:0], torch.tensor([], dtype=torch.int64), layer)


def test_a_cache_that_is_a_view_is_refused():
    both = torch.zeros(4, 2, 2, 3, 16)  # keys and values side by side, as in some engines
    layer, k = CacheLayer(both[:, 0], both[:, 1]), torch.randn(1, 3, 16)
    with pytest.raises(ValueError, match="must each be contiguous"):
        store(k, k, torch.tensor([0]), layer)
    with pytest.raises(ValueError, match="must each be contiguous"):
        cached_attention(k, replace(Sequences.packed([1]), block_table=torch.zeros(1, 1, dtype=torch.int32)), layer)


def test_places_beyond_two_to_the_31():
    """A cache of 4.3 GB each for keys and values, of which two pages are ever touched."""
    pages = 2**31 // (32 * 16) + 8
    layer = CacheLayer(*(torch.empty(pages, 32, 1, 16, dtype=torch.float16) for _ in range(2)))
    table = torch.tensor([[pages - 1, pages - 4]], dtype=torch.int32)
    q, k, v = draw(Batch([(40, 0, -1)], []), 2, 1, 16, dtype=torch.float16)
    sequences = Sequences.packed([40])
    slots = torch.tensor([int(table[0, i // 32]) * 32 + i % 32 for i in range(40)])
    assert int(slots.min()) * 16 > 2**31
    out = attention(q, k, v, replace(sequences, block_table=table, slots=slots), layer, "triton")
    torch.testing.assert_close(out, attention(q, k, v, sequences, backend="torch"), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_plan_and_cache_belong_together(backend):
    batch = CACHED["decode behind a shared prefix"]
    q, k, v = draw(batch, 4, 2, 16, dtype=torch.float32)
    sequences, layer = cached_plan(batch, k, v, 4, 0)
    bare, half = replace(sequences, block_table=None, prefix_table=None), replace(sequences, prefix_table=None)
    wrong = [(sequences, None, "goes with a cache"), (bare, layer, "goes with a cache"), (half, layer, "goes with a cache"), (bare, None, "lies in a cache, and there is none")]
    for plan, cache, told in wrong:
        with pytest.raises(ValueError, match=told):
            attention(q, k[:3], v[:3], plan, cache, backend)


def test_padding_only():
    q, layer = torch.randn(0, 2, 16), CacheLayer(*(torch.randn(2, 4, 1, 16) for _ in range(2)))
    empty = replace(Sequences.packed([0, 0]), block_table=torch.zeros(2, 1, dtype=torch.int32), slots=torch.zeros(0, dtype=torch.int64))
    assert attention(q, q[:, :1], q[:, :1], empty, layer, "triton").shape == (0, 2, 16)


def case(kernel, rows, dim, gpu, targets):
    """`_attend` of a class, or `_attend_prefix`."""
    tile = tile_for(kernel, rows, gpu)
    integers, numbers = "place prefix_of prefix_len prefix_table", "prefix_width rooms"
    integers += " owner" if kernel == "cached_prefix" else " cu_q past block_table"
    numbers += " tokens" if kernel == "cached_prefix" else " block_width least most tiles behind"
    signature = {f"{name}_ptr": "*bf16" for name in ("q", "keys", "values")} | {f"{name}_ptr": "*i32" for name in integers.split()}
    signature |= {"out_ptr": "*fp32" if tile.k else "*bf16", "lse_ptr": "*fp32", "scale": "fp32"}
    signature |= {"q_token": "i32:16", "q_head": "i32:16"} | {name: "i32" for name in numbers.split()}
    constants = {"HEADS": 16, "GROUP": 2, "D": dim, "P": 32, "M": tile.m, "N": tile.n, "SPLIT": tile.k}
    matrix = rows != 16  # 16 rows are too few for wgmma
    name = "_attend_prefix" if kernel == "cached_prefix" else "_attend"
    return Case(f"harkd.kernels.cached_attention:{name}", signature, constants, tile.warps, tile.stages, matrix, targets, wide=2)


@each_target
def test_kernels_compile(target):
    families = {"sm_80": ANY, "sm_90": "sm90", "sm_100": ANY, "gfx942": "gfx942"}
    assert set(families) == set(TARGETS)
    kinds = [("cached", rows) for rows in CLASSES] + [("cached_prefix", 0)]
    cases = [case(*kind, dim, families[target], (target,)) for kind in kinds for dim in (64, 128)]
    integers = {f"{name}_ptr": "*i32" for name in "owner place cu_q past prefix_of prefix_len".split()}
    integers |= {name: "i32" for name in "least most behind rooms".split()}
    floats = {"parts_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
    sizes = {"HEADS": 16, "D": 128, "SHARED": 256, "SPLIT": 256, "JOINED": JOINED}
    cases.append(Case("harkd.kernels.cached_attention:_join", floats | integers, sizes))
    cache = {f"{name}_ptr": "*bf16" for name in "k v keys values".split()} | {"slots_ptr": "*i64"}
    strides = {name: "i32:16" for name in "k_token k_head v_token v_head".split()}
    cases.append(Case("harkd.kernels.cached_attention:_store", cache | strides, {"K": 8, "D": 128, "BLOCK": 1024}))
    assert_compiles(cases, target)
