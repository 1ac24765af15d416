"""Generation on this machine at real sizes: harkd, transformers and bare linear products, on the same windows in the same run.

    python -m tools.make_checkpoint FOLDER --like 0.6B --tokenizer QWEN3
    python -m tools.bench_generate FOLDER --data marble:PATH [--windows 16 --batch 8 --dtype float32 --new 64]

Three tasks, greedy, without reasoning: guided answers; the same number of tokens, free; `--new` free tokens. transformers generates as many
tokens as harkd's answers have, by `generate` over left-padded batches, once over whole prompts and once behind a prefix that it
prefilled. The last line is JSON with `ratios`:

    prefill_to_products    time of the linear maps alone (without the head) on the windows' tokens / harkd's prefill
    decode_to_products     time of the linear maps and the head on `batch` rows / harkd's time for a step of `batch` sequences
    guided_to_transformers, guided_to_transformers_prefix, free_to_transformers, free_to_transformers_prefix    their seconds / harkd's
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from harkd.homes.dataset import read
from harkd.memory import peak_memory
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.recognition import Guiding, request
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request, Sampling
from tools.bench_prefill import bare_products, median_seconds


def seconds(run: Callable[[], object]) -> float:
    """Time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def products(model: Qwen3, rows: int, head: bool) -> float:
    """Median seconds of the linear maps of all layers, and the head's, on `rows` rows."""
    return median_seconds(bare_products(model, rows, head), repeats=3)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    dataset, tokenizer = read(args.data), load_tokenizer(args.model)
    windows = list(islice(cycle(islice(dataset.windows("test"), args.windows)), args.windows))
    greedy, guiding = Sampling(temperature=0, max_new_tokens=1024), Guiding(guided=True)
    asked = [request(dataset.home(w.home), w, thinking=False, sampling=greedy, guiding=guiding) for w in windows]
    asked = [replace(one, window=str(i)) for i, one in enumerate(asked)]
    prefix, owns = tokenizer.encode(asked[0].prefix), [tokenizer.encode(one.prompt) for one in asked]

    model = load_model(args.model, "cpu", args.dtype)
    tokenizer.stop_ids = ()  # a random model stops anywhere
    generator = Generator(model, tokenizer, batch=args.batch)

    def free(new: int) -> list[Request]:
        return [replace(one, answer=(), sampling=replace(greedy, max_new_tokens=new)) for one in asked]

    first = seconds(lambda: list(generator.generate(free(1)[:1])))  # and the prefix
    prefill = seconds(lambda: list(generator.generate(free(1))))
    lengths = []
    guided = seconds(lambda: lengths.extend(len(done.ids) for done in generator.generate(asked)))
    answer = max(lengths)
    text, short = (seconds(lambda: list(generator.generate(free(new)))) for new in (answer, args.new))
    step = (text - prefill) / (answer - 1) / (len(asked) / args.batch)
    own, memory = sum(map(len, owns)), peak_memory()["cpu"]
    one_window, one_step = products(model, own // len(owns), False) * len(owns), products(model, own, False)
    bare, rows = min(one_window, one_step), products(model, args.batch, True)
    print(f"{len(asked)} windows, prefix {len(prefix)}, own {own / len(owns):.0f}, answers {answer}; {torch.get_num_threads()} threads")
    print(f"harkd: prefix and first window {first:.1f} s; prefill {own / prefill:.0f} tokens/s (bare products {own / bare:.0f})")
    print(f"harkd: step of {args.batch} {1e3 * step:.0f} ms (bare products {1e3 * rows:.0f}), {args.batch / step:.1f} tokens/s")
    print(f"harkd: guided {guided:.1f} s, {len(asked) / guided:.3f} windows/s; free {text:.1f} s; {args.new} tokens {short:.1f} s")
    print(f"harkd: peak memory {memory / 1e9:.2f}e9 bytes", flush=True)

    del generator, model
    other = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    whole = seconds(lambda: theirs(other, [prefix + ids for ids in owns], [], answer, args.batch))
    behind = seconds(lambda: theirs(other, owns, prefix, answer, args.batch))
    print(f"transformers: {answer} tokens, whole prompts {whole:.1f} s, behind the prefix {behind:.1f} s")
    ratios = {
        "prefill_to_products": bare / prefill, "decode_to_products": rows / step, "guided_to_transformers": whole / guided,
        "guided_to_transformers_prefix": behind / guided, "free_to_transformers": whole / text,
        "free_to_transformers_prefix": behind / text,
    }  # fmt: skip
    print(json.dumps({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
