"""Prefill at the real sizes of Qwen3-0.6B on this machine: windows behind a shared prefix, beside torch's bare linear products in the
same run.

    python -m tools.bench_prefill --model FOLDER        (python -m tools.make_checkpoint FOLDER --like 0.6B --tokenizer ...)

Prints seconds, tokens/s, peak resident memory of this process and, as its last line, JSON with `ratios`: `prefill_to_products` is the
products' time over the prefill's, where the products are the seven linear maps of all layers on as many rows, without the head, at the
faster of two packings (one window, one step at a time).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import harkd.eval  # noqa: F401  (the doors count among the imports)
import harkd.generate  # noqa: F401
import harkd.train  # noqa: F401
from harkd.memory import peak_memory
from harkd.qwen3.config import PROJECTIONS
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request, Sampling


def seconds(run: Callable[[], object]) -> float:
    """Time of one run, to the end of what a GPU was given."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of `run` over repeats, after one run that does not count."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


def text_of(tokenizer, count: int, seed: int) -> str:
    """Text of exactly `count` tokens."""
    words = torch.randint(1000, 40000, (4 * count,), generator=torch.Generator().manual_seed(seed)).tolist()
    text = ""
    for word in words:
        longer = text + f" {word}"
        if len(tokenizer.encode(longer)) > count - 1:
            break
        text = longer
    while len(tokenizer.encode(text)) < count:
        text += "!" if text.endswith(")") else ")"
    return text


@torch.inference_mode()
def bare_products(model: Qwen3, rows: int, head: bool = False) -> Callable[[], None]:
    """The linear maps of all layers, joined where the model has joined them, and the head's if wanted, on `rows` rows."""
    maps = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            product = module.joined or partial(torch.nn.functional.linear, weight=module.weight)
            maps[id(product)] = product, module.in_features
    if head:
        maps["head"] = model.head, model.config.hidden_size
    inputs = {width: torch.randn(rows, width, dtype=model.dtype) for _, width in maps.values()}

    @torch.inference_mode()
    def run() -> None:
        for product, width in maps.values():
            product(inputs[width])

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefix", type=int, default=900)
    parser.add_argument("--window", type=int, default=350)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)

    tokenizer, model = load_tokenizer(args.model), load_model(args.model, "cpu", "bfloat16")
    prefix, texts = text_of(tokenizer, args.prefix, 0), [text_of(tokenizer, args.window, 1 + i) for i in range(args.windows)]
    generator = Generator(model, tokenizer, batch=args.windows)
    one_token = Sampling(temperature=0, max_new_tokens=1)
    requests = [Request(f"w{i}", text, prefix, 0, one_token) for i, text in enumerate(texts)]
    rows = sum(len(tokenizer.encode(text)) for text in texts)
    start = time.perf_counter()
    first = next(iter(generator.generate(requests[:1])))
    prefix_seconds = time.perf_counter() - start
    # the first run of the median warms up; the prefix stays in the cache
    prefill = median_seconds(lambda: list(generator.generate(requests)), args.repeats)
    memory = peak_memory()["cpu"]
    one_window = median_seconds(bare_products(model, args.window), args.repeats) * args.windows
    one_step = median_seconds(bare_products(model, rows), args.repeats)
    products = min(one_window, one_step)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"prompt of {first.prompt_tokens} tokens, prefix and first window {prefix_seconds:.2f} s")
    print(f"prefill: {rows} tokens in {prefill:.2f} s, {rows / prefill:.0f} tokens/s")
    print(f"bare products: {products:.2f} s (window by window {one_window:.2f} s, all rows at once {one_step:.2f} s)")
    print(f"peak resident memory: {memory / 1e9:.2f}e9 bytes")
    ratios = {"prefill_to_products": products / prefill, "peak_bytes_to_limit": memory / 2.2e9}
    print(json.dumps({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
