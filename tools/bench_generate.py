"""Generation on this machine at real sizes: harkd, transformers and the limit of the hardware, on the same windows in the same run.

    python -m tools.make_checkpoint FOLDER --like 0.6B --tokenizer QWEN3
    python -m tools.bench_generate FOLDER --data marble:PATH [--windows 64 --batch 32 --new 256 --dtype bfloat16 --alone]

Three tasks, greedy, without reasoning: guided answers; the same number of tokens, free; `--new` free tokens. transformers generates as many
tokens as harkd's answers have, by `generate` over left-padded batches of 8 and of 32, of which the faster counts, once over whole prompts
and once behind a prefix that it prefilled; llama.cpp, where it is installed, decodes `batch` windows at a time behind a prefix that it
prefilled, the weights in the same dtype (tools/llamacpp.py). `--alone` leaves both out. The last line is JSON with `ratios`:

    prefill_to_limit     the limit of the windows' tokens / harkd's prefill of them
    decode32_to_limit    the limit of a step of `batch` (32) sequences / harkd's median step
    guided_to_transformers, guided_to_transformers_prefix, free_to_transformers, free_to_transformers_prefix    their seconds / harkd's
    guided_to_llamacpp, free_to_llamacpp (of `--new` tokens), batch1_to_llamacpp (a step of one sequence)           the same

The limit is the linear maps alone (torch's plain products or harkd's joined ones, whichever are faster; in decoding with the head), the
products of attention alone on contiguous tensors of these shapes, and the bytes of the cache at the measured bandwidth of reading.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from harkd.homes.dataset import read
from harkd.memory import peak_memory, reset_peak_memory
from harkd.qwen3.cache import token_bytes
from harkd.qwen3.linear import join
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.recognition import Guiding, request
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request, Sampling
from tools.bench_prefill import bare_products, median_seconds, seconds

THEIR_BATCHES = (8, 32)


@torch.inference_mode()
def products(left: tuple[int, int, int], keys: int, dtype: torch.dtype) -> float:
    """Median seconds of q k^T and p v, where q is [heads, rows, D] and there are so many keys."""
    heads, rows, dim = left
    q, p, k, v = (torch.randn(heads, *shape, dtype=dtype) for shape in ((rows, dim), (rows, keys), (dim, keys), (keys, dim)))
    return median_seconds(lambda: (torch.bmm(q, k), torch.bmm(p, v)), repeats=3)


class Limit:
    """What this machine needs at least for the work of a model, beside which its own time is put."""

    def __init__(self, model: Qwen3, prefix: int) -> None:
        config, block = model.config, torch.ones(1 << 26)
        self.model, self.prefix, self.layers, self.dtype = model, prefix, config.num_hidden_layers, model.dtype
        self.heads, self.group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.dim = config.head_dim
        self.bandwidth = block.nbytes / median_seconds(block.sum, repeats=3)
        self.token = token_bytes(config, model.dtype)
        self.linear: dict[tuple[int, bool], float] = {}

    def measure(self, rows: int, head: bool) -> None:
        """Take the linear maps' time as the model has them now, where that is the best so far."""
        now = median_seconds(bare_products(self.model, rows, head), repeats=3)
        self.linear[rows, head] = min(now, self.linear.get((rows, head), now))

    def prefill(self, own: int) -> float:
        """Seconds of a window of `own` tokens behind the prefix; a token sees half of the window."""
        keys = self.prefix + own // 2
        attention = products((self.heads, own * self.group, self.dim), keys, self.dtype) * self.layers
        return self.linear[own, False] + attention + (self.prefix + own) * self.token / self.bandwidth

    def decode(self, batch: int, own: int) -> float:
        """Seconds of a step of `batch` sequences of `own` tokens each."""
        shared = products((self.heads, batch * self.group, self.dim), self.prefix, self.dtype)
        attention = (shared + products((batch * self.heads, self.group, self.dim), own, self.dtype)) * self.layers
        return self.linear[batch, True] + attention + (self.prefix + batch * own) * self.token / self.bandwidth


@torch.inference_mode()
def theirs(model, prompts: list[list[int]], prefix: list[int], new: int, batch: int) -> list[list[int]]:
    """The `new` tokens that transformers writes behind every prompt, batch by batch; behind `prefix`, where it is given, computed once."""
    written = []
    cache = model(torch.tensor([prefix]), past_key_values=DynamicCache(config=model.config)).past_key_values if prefix else None
    for at in range(0, len(prompts), batch):
        some = prompts[at : at + batch]
        width = max(map(len, some))
        ids = torch.tensor([prefix + [0] * (width - len(own)) + own for own in some])
        mask = torch.tensor([[1] * len(prefix) + [0] * (width - len(own)) + [1] * len(own) for own in some])
        shared = copy.deepcopy(cache)
        if shared is not None:
            shared.batch_repeat_interleave(len(some))
        how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        written += model.generate(ids, attention_mask=mask, past_key_values=shared, **how)[:, -new:].tolist()
    return written


def compare(model: str, dtype: str, prefix: list[int], owns: list[list[int]], answer: int) -> tuple[float, float]:
    """Seconds of transformers over whole prompts, and behind the prefix."""
    other = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    reset_peak_memory()
    batches = [batch for batch in THEIR_BATCHES if batch <= len(owns)] or [len(owns)]
    whole = min(seconds(lambda: theirs(other, [prefix + ids for ids in owns], [], answer, batch)) for batch in batches)
    behind = min(seconds(lambda: theirs(other, owns, prefix, answer, batch)) for batch in batches)
    print(f"transformers: {answer} tokens, whole prompts {whole:.1f} s, {len(owns) / whole:.3f} windows/s; behind a prefix {behind:.1f} s")
    print(f"transformers: peak memory {peak_memory()['cpu'] / 1e9:.2f}e9 bytes")
    return whole, behind


def compare_llamacpp(model: str, dtype: str, prefix: list[int], owns: list[list[int]], answer: int, new: int, batch: int) -> list[float]:
    """Seconds of llama.cpp, with the faster of its caches: `answer` and `new` tokens behind every window, and a step of one sequence."""
    from tools.llamacpp import LlamaCpp, write_gguf

    found = []
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = write_gguf(model, Path(folder) / "model.gguf", dtype).vocab_size
        for unified in (True, False):
            room = len(prefix) + max(map(len, owns)) + max(answer, new)
            other = LlamaCpp(Path(folder) / "model.gguf", prefix, batch, room, vocab_size, unified)

            def run(count: int, other: LlamaCpp = other) -> None:
                for at in range(0, len(owns), batch):
                    other.generate(owns[at : at + batch], count)

            one = [seconds(lambda n=n, other=other: other.generate(owns[:1], n)) for n in (1, 17)]
            found.append([seconds(lambda: run(answer)), seconds(lambda: run(new)), (one[1] - one[0]) / 16])
            other.close()
            cache, (some, all_, step) = "one cache" if unified else "a cache for each sequence", found[-1]
            print(f"llama.cpp: {cache}, {answer} tokens {some:.1f} s, {new} tokens {all_:.1f} s, step of one {1e3 * step:.0f} ms")
    return [min(times) for times in zip(*found, strict=True)]


def timed(generator: Generator) -> list[tuple[int, float]]:
    """(sequences, seconds) of every step from now on in which all of them write a token."""
    steps, step = [], generator._step

    def run(running: list) -> None:
        decoding = all(one.past == len(one.tokens) - 1 for one in running)
        took = seconds(lambda: step(running))
        if decoding:
            steps.append((len(running), took))

    generator._step = run
    return steps


def own_times(
    generator: Generator, asked: list[Request], free: Callable[[int], list[Request]], steps: list[tuple[int, float]]
) -> tuple[float, float, int, float]:
    """Seconds of harkd's guided answers and of as many free tokens, how many those are, and seconds of a step of one sequence."""
    steps.clear()
    list(generator.generate(free(17)[:1]))
    single = statistics.median(took for _, took in steps)
    lengths = []
    guided = seconds(lambda: lengths.extend(len(done.ids) for done in generator.generate(asked)))
    text = seconds(lambda: list(generator.generate(free(max(lengths)))))
    print(f"harkd: guided {guided:.1f} s, {len(asked) / guided:.3f} windows/s; {max(lengths)} free tokens {text:.1f} s")
    print(f"harkd: step of one sequence {1e3 * single:.0f} ms")
    return guided, text, max(lengths), single


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--alone", action="store_true", help="harkd and the limit only")
    args = parser.parse_args(argv)
    dataset, tokenizer = read(args.data), load_tokenizer(args.model)
    windows = list(islice(cycle(islice(dataset.windows("test"), args.windows)), args.windows))
    greedy, guiding = Sampling(temperature=0, max_new_tokens=1024), Guiding(guided=True)
    asked = [request(dataset.home(w.home), w, thinking=False, sampling=greedy, guiding=guiding) for w in windows]
    asked = [replace(one, window=str(i)) for i, one in enumerate(asked)]
    prefix, owns = tokenizer.encode(asked[0].prefix), [tokenizer.encode(one.prompt) for one in asked]
    own, batch = sum(map(len, owns)) // len(owns), min(args.batch, len(owns))

    model = load_model(args.model, "cpu", args.dtype)
    tokenizer.stop_ids = ()  # a random model stops anywhere
    limit = Limit(model, len(prefix))
    for _ in ("plain", "joined"):
        limit.measure(own, False)
        limit.measure(batch, True)
        join(model)
    generator = Generator(model, tokenizer, batch=batch)
    steps = timed(generator)

    def free(new: int) -> list[Request]:
        return [replace(one, answer=(), sampling=replace(greedy, max_new_tokens=new)) for one in asked]

    reset_peak_memory()
    first = seconds(lambda: list(generator.generate(free(1)[:1])))  # and the prefix
    prefill = seconds(lambda: list(generator.generate(free(1)))) / len(owns)
    steps.clear()
    short = seconds(lambda: list(generator.generate(free(args.new))))
    full = [took for count, took in steps if count == batch]
    if not full:
        parser.error(f"--new {args.new} is too short: the first of {batch} sequences ended before the last began")
    step = statistics.median(full)
    bare, rows = limit.prefill(own), limit.decode(batch, own + args.new // 2)
    machine = f"{torch.get_num_threads()} threads, reads {limit.bandwidth / 1e9:.1f}e9 bytes/s"
    print(f"{len(asked)} windows, prefix {len(prefix)}, own {own}; {machine}")
    print(f"harkd: prefix and first window {first:.1f} s; prefill {own / prefill:.0f} tokens/s (limit {own / bare:.0f})")
    print(f"harkd: step of {batch} {1e3 * step:.0f} ms (limit {1e3 * rows:.0f}), {batch / step:.1f} tokens/s (limit {batch / rows:.1f})")
    print(f"harkd: {args.new} free tokens {short:.1f} s, {len(asked) / short:.3f} windows/s", flush=True)
    ratios = {"prefill_to_limit": bare / prefill, f"decode{batch}_to_limit": rows / step}
    if not args.alone:
        guided, text, answer, single = own_times(generator, asked, free, steps)
    print(f"harkd: peak memory {peak_memory()['cpu'] / 1e9:.2f}e9 bytes", flush=True)
    if not args.alone:
        del generator, model, limit, steps
        whole, behind = compare(args.model, args.dtype, prefix, owns, answer)
        ratios |= {"guided_to_transformers": whole / guided, "guided_to_transformers_prefix": behind / guided}
        ratios |= {"free_to_transformers": whole / text, "free_to_transformers_prefix": behind / text}
        if find_spec("llama_cpp") and find_spec("gguf"):
            answers, longer, one = compare_llamacpp(args.model, args.dtype, prefix, owns, answer, args.new, batch)
            ratios |= {"guided_to_llamacpp": answers / guided, "free_to_llamacpp": longer / short, "batch1_to_llamacpp": one / single}
    print(json.dumps({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
