"""How many tokens a step may have where memory is short.

A step that finds no memory comes again with half as many tokens. Where several processes hold a model together the others would wait in the
middle of it for the one that failed: so these run the largest step once before the first request, each by itself, and agree.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from harkd.errors import UserError
from harkd.qwen3.cache import Cache
from harkd.qwen3.model import Qwen3
from harkd.sampling.request import Sampling
from harkd.sampling.sampler import sample, uniform
from harkd.sampling.sequence import Run, pack


def lacks_memory(error: RuntimeError) -> bool:
    """Whether that is what an error says."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halved(tokens: int) -> int:
    """What to try behind a step of so many tokens that found no memory. Raises UserError where one was too much."""
    if tokens == 1:
        raise UserError("there is no memory for a step of a single token: lower --cache-tokens")
    return tokens // 2


@torch.inference_mode()
def rehearse(model: Qwen3, cache: Cache, tokens: int, batch: int) -> int:
    """Tokens of a step, up to `tokens`, for which every process of the model's group finds memory, and logits for `batch` of them.

    Raises UserError where there is none for a single one.
    """
    group, pages = model.group, list(range(len(cache.free)))
    longest = min(len(pages) * cache.page_size, model.config.max_position_embeddings)
    tokens = min(tokens, longest)
    while True:
        run, failed = Run([0] * longest, pages, past=longest - tokens), 0  # whatever lies there: behind as much as there can be
        try:
            model.group = replace(group, rank=0, size=1)
            rows = model.hidden(*pack({run: run.tokens[run.past :]}, cache, model.device), cache)[:batch]
            numbers = torch.arange(len(rows), device=model.device)
            sample(model.head(rows), Sampling(), uniform(numbers, numbers))
        except RuntimeError as error:
            failed = 1
            if not lacks_memory(error):
                raise
        finally:
            model.group = group
        if group.sum([failed]) == [0]:
            return tokens
        tokens = halved(tokens)
