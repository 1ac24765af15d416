"""A teacher's likeliest tokens at every supervised token, found once and stored, so that it need not be in memory while the student learns.

    teacher.safetensors    ids [N, K] int32, logprobs [N, K] float32: log softmax(logits / temperature), over the N supervised tokens of all
                           examples in their order; metadata "examples": their digest
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from harkd.distill.examples import Examples, TrainingExample, digest_into
from harkd.distill.packing import collate, memory_for, plan
from harkd.distributed import World
from harkd.kernels.loss import logits_of
from harkd.qwen3.model import Qwen3
from harkd.tensors import write_tensors

ROWS = 128  # projected at a time


def with_top_k(
    examples: Examples, path: Path, k: int, batch_tokens: int, temperature: float, vocab_size: int, load: Callable[[], Qwen3],
    world: World = World(),
) -> list[TrainingExample]:  # fmt: skip
    """The examples with what a teacher says to each: read from `path`, or first written there by load() where that has not these."""
    k = min(k, vocab_size)
    ends = torch.tensor([0, *(sum(example.mask) for example in examples)]).cumsum(0).tolist()
    digest = hashlib.sha256()
    digest_into(digest, examples)
    if world.rank == 0 and _digest_of(path) != digest.hexdigest():
        teacher = load()
        ids, logprobs = torch.empty(ends[-1], k, dtype=torch.int32), torch.empty(ends[-1], k)
        for pack in plan(examples, batch_tokens, seed=0, epoch=0):  # examples of one prefix stand together in it, as collate lays them out
            rows = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in pack])
            batch = collate([examples[i] for i in pack], teacher.device)
            with torch.no_grad(), memory_for(batch, "lower --batch-tokens"):
                hidden = teacher.hidden(batch.ids, batch.positions, batch.sequences)[batch.rows]
                for part, place in zip(hidden.split(ROWS), rows.split(ROWS), strict=True):
                    logits = logits_of(part, teacher.head_weight[:vocab_size]) / temperature  # [n, V]
                    likeliest = logits.log_softmax(-1).topk(k)
                    ids[place], logprobs[place] = likeliest.indices.int().cpu(), likeliest.values.float().cpu()
        write_tensors(path, {"ids": ids, "logprobs": logprobs}, {"examples": digest.hexdigest()})
    world.sum([0.0])  # the file is there
    with safe_open(path, "pt") as file:
        ids, logprobs = file.get_tensor("ids"), file.get_tensor("logprobs")
    return [replace(e, top=(ids[a:b], logprobs[a:b])) for e, a, b in zip(examples, ends, ends[1:], strict=False)]


def _digest_of(path: Path) -> str | None:
    """The examples that a file is about; None where there is none, or a damaged one."""
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("examples")
    return None
