"""A model in parts: what each process holds and reads, that all together write what one process writes, and what they agree about."""

import signal
import socket
from dataclasses import dataclass, field, replace
from threading import Barrier, Thread

import pytest
import torch

from harkd.distributed import World
from harkd.errors import UserError
from harkd.generate import main
from harkd.qwen3.parallel import divided
from harkd.qwen3.weights import load_model, save_model
from harkd.sampling.generator import Generator
from harkd.tensors import Stored, read_into
from tests.door_cases import data, model, outcome, run, short_prompts, spawn  # noqa: F401
from tests.generator_cases import GREEDY, endless, request, short_of_memory, tiny  # noqa: F401
from tests.test_doors_generate import argv, ids, texts, wanted  # noqa: F401
from tests.test_moe import random as random_experts
from tests.tiny import random_model, tiny_config


@dataclass(frozen=True)
class Part(World):
    """One thread among several: their sums go by way of a table that all of them see."""

    meeting: Barrier | None = None
    table: list = field(default_factory=list)

    def add(self, tensor):
        if self.size == 1:
            return tensor
        self.table[self.rank] = tensor.clone()
        self.meeting.wait(60)
        total = sum(self.table)
        self.meeting.wait(60)
        return tensor.copy_(total)

    def first(self, tensor):
        return self.add(tensor if self.rank == 0 else torch.zeros_like(tensor))


def together(size, work):
    """work(part) of each of `size` threads."""
    meeting, table, found = Barrier(size), [None] * size, [None] * size

    def one(rank):
        try:
            found[rank] = work(Part(rank, size, meeting=meeting, table=table))
        except BaseException:
            meeting.abort()
            raise

    threads = [Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("size", "whole"),
    [(2, lambda: random_model(dtype=torch.float64)), (4, lambda: random_model(dtype=torch.float64)), (4, lambda: random_experts(dtype=torch.float64))],
    ids=["a key head each", "two processes a key head", "experts"],
)
def test_parts_have_the_logits_of_the_whole_from_shards_and_in_other_dtypes(tmp_path, size, whole):
    truth, ids_ = whole(), torch.arange(3, 40)
    save_model(truth, tmp_path, shard_bytes=100_000)
    with torch.no_grad():
        expected = truth.logits(ids_)

    def work(part):
        model = load_model(tmp_path, "cpu", group=part)
        with torch.no_grad():
            return model.logits(ids_), {name: parameter.shape for name, parameter in model.named_parameters()}, load_model(tmp_path, "cpu", "float32", group=part)

    for logits, shapes, other in together(size, work):
        torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)
        assert other.dtype == torch.float32 and torch.equal(other.model.norm.weight, truth.model.norm.weight.float())
        mlp = "model.layers.1.mlp." + ("experts.2." if "model.layers.1.mlp.gate.weight" in shapes else "")
        keys, width = max(2 // size, 1) * 16, (24 if "experts" in mlp else 48) // size
        assert shapes["model.layers.0.self_attn.o_proj.weight"] == (32, 64 // size) and shapes["model.layers.1.self_attn.k_proj.weight"] == (keys, 32)
        assert shapes[mlp + "up_proj.weight"] == (width, 32) and shapes[mlp + "down_proj.weight"] == (32, width) and shapes["lm_head.weight"] == (384, 32)


@pytest.mark.parametrize("buffer", [10, 1 << 20])
def test_a_part_is_read_and_nothing_else(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr("harkd.tensors.BUFFER", buffer)
    whole, path = torch.arange(6 * 4, dtype=torch.float32).view(6, 4), tmp_path / "file"
    path.write_bytes(b"head" + whole.numpy().tobytes())
    stored, asked = Stored(path, torch.float32, (6, 4), 4, 96), []
    for axis, parts in ((0, 1), (1, 1), (0, 3), (0, 2), (1, 2), (1, 4)):
        for number, truth in enumerate(whole.chunk(parts, axis)):
            part = stored.part(axis, number, parts)
            for dtype in (torch.float32, torch.float64):
                target = torch.empty(part.shape, dtype=dtype)
                read_into(part, target)
                assert torch.equal(target, truth.to(dtype))
            asked.append((part.size, part.runs))
    assert asked == [(96, 1), (96, 1), *[(32, 1)] * 3, *[(48, 1)] * 2, *[(48, 6)] * 2, *[(24, 6)] * 4]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="ended while it was read"):
        read_into(stored.part(1, 3, 4), torch.empty(6, 1))
    read_into(stored.part(1, 2, 4), torch.empty(6, 1))  # of which the last byte is none


@pytest.mark.parametrize(("size", "name"), [(3, "num_attention_heads is 4"), (8, "num_attention_heads is 4"), (2, "intermediate_size is 49")])
def test_a_model_that_cannot_be_shared(size, name):
    config = tiny_config(intermediate_size=49)
    with pytest.raises(UserError, match=f"^{size} processes cannot share a model whose {name}: take another number of them$"):
        divided(config, size)
    with pytest.raises(UserError, match="4 processes cannot share a model whose num_key_value_heads is 6"):
        divided(replace(config, num_attention_heads=12, num_key_value_heads=6), 4)


def test_what_cannot_be_is_told(argv, model, tmp_path):
    assert outcome(main, *argv, "--tensor-parallel", 0)[3].startswith("harkd.generate: --tensor-parallel must be at least 1")
    code, _, _, err = outcome(main, *argv, "--tensor-parallel", 2)
    assert code == 2 and err.count("\n") == 1 and "2 processes are to hold a model together, and 1 cannot be divided so: start 2" in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="takes no adapter: merge it with harkd.train --export"):
        load_model(model, "cpu", adapter="x", group=World(0, 2))


def test_the_first_draws_for_all_and_no_memory_ends_all(endless, monkeypatch):
    class Second(World):
        def first(self, tensor):
            return torch.full_like(tensor, 7)

    monkeypatch.setattr(endless.model, "group", Second())
    (done,) = Generator(endless.model, endless.tokenizer).generate([request("a", "x")])
    assert done.ids == [7] * GREEDY.max_new_tokens

    class Pair(World):
        def sum(self, values):
            return [values[0], 9] if len(values) == 2 else values  # the other has nine pages

    monkeypatch.setattr(endless.model, "group", Pair(0, 2))
    assert len(Generator(endless.model, endless.tokenizer, cache_tokens=4096).cache.free) == 9
    g = Generator(endless.model, endless.tokenizer)
    monkeypatch.setattr(endless.model, "hidden", short_of_memory(endless.model.hidden, 30))  # what was found at the start is no more
    with pytest.raises(UserError, match="no memory for a step of .* tokens in one of the processes: lower --cache-tokens"):
        list(g.generate([request("a", "x" * 40)]))


def test_where_one_process_finds_no_memory_all_take_smaller_steps(endless, tmp_path):
    """The second finds none for more than thirty tokens: both lower their steps at once, and write what one process writes."""
    save_model(endless.model, tmp_path)
    requests = [request(str(n), "fridge opened " * n) for n in range(5)]
    expected = {c.request.window: c.ids for c in Generator(endless.model, endless.tokenizer, cache_tokens=4096).generate(requests)}

    def work(part, most=30):
        model, sizes = load_model(tmp_path, "cpu", group=part), []
        if part.rank == 1:
            model.hidden = short_of_memory(model.hidden, most)
        g = Generator(model, endless.tokenizer, batch=4, cache_tokens=4096, step_tokens=100)
        hidden = model.hidden
        model.hidden = lambda ids, *rest: sizes.append(len(ids)) or hidden(ids, *rest)
        return {c.request.window: c.ids for c in g.generate(requests)}, g.step_tokens, max(sizes), model.group is part

    assert together(2, work) == [(expected, 25, 25, True)] * 2

    def none_at_all(part):
        with pytest.raises(UserError, match="no memory for a step of a single token: lower --cache-tokens"):
            work(part, 0)
        return True

    assert together(2, none_at_all) == [True] * 2


def start(size, *argv):
    """The door in `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [spawn("generate", *argv, **common, RANK=rank, LOCAL_RANK=rank) for rank in range(size)]


@pytest.mark.slow
def test_two_processes_with_one_model_and_two_teams_of_two_write_as_one_process_does(argv, data, tmp_path):
    """One of two is lost, which the other tells; four go on from there."""
    argv = [*argv, "--max-new-tokens", 24]
    run(main, *argv)
    expected, out = texts(tmp_path / "out"), tmp_path / "parts"
    argv = [*argv, "--out", out, "--tensor-parallel", 2]
    first, second = start(2, *argv, "--batch", 1)
    while not ((out / "traces.jsonl").exists() and (out / "traces.jsonl").stat().st_size):
        assert first.poll() is None
    second.send_signal(signal.SIGKILL)
    _, err = first.communicate(timeout=120)
    second.communicate()
    assert first.returncode == 2 and "another process of this run was lost" in err and "start all of them again" in err and "Traceback" not in err
    before = ids(out)
    assert 1 <= len(set(before)) == len(before) < len(expected) and set(before) <= wanted(data)

    processes = start(4, *argv)
    told = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert texts(out) == expected and len(ids(out)) == len(expected) and ids(out)[: len(before)] == before
    assert [text.splitlines()[1:] == [] for text, _ in told] == [False, True, True, True] and '"traces": 8' in told[0][0]  # the first speaks
    assert outcome(main, *argv[:-2])[3].count("is done") == 1
