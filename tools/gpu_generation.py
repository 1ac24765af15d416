"""What gpu_check measures of generation: whole models of random weights, at the shapes of Qwen3-0.6B and of 32B.

    decode_to_limit    what a step must read: the weights, the prefix's part of the cache once and each window's own, its text half written,
                       at the bandwidth measured (or what it must multiply, if that takes longer) / harkd's seconds of a step
    to_transformers    transformers' seconds of `generate` over whole prompts, in the same dtype and batch, all at once / harkd's
    first_token        15 ms / the median time to the first token of one window behind a prefix in the cache

First a small model writes the same texts in bursts, as graphs, and in single steps. Tokens are drawn from Qwen3's whole vocabulary.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harkd.qwen3.cache import token_bytes
from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.linear import join
from harkd.qwen3.model import Qwen3
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import as_dtype
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request, Sampling
from tools.bench_prefill import seconds
from tools.make_checkpoint import SIZES, random_model

if TYPE_CHECKING:
    from tools.gpu_check import Record

TOKENIZER = Path(__file__).resolve().parents[1] / "harkd/models/nano-student"
SOON = 0.015  # seconds to the first token


@dataclass(frozen=True)
class Case:
    """`batch` windows of `own` tokens behind one prefix, `new` tokens written for each; `least`: what is wanted of the ratios."""

    name: str
    config: Qwen3Config
    batch: int
    prefix: int = 900
    own: int = 350
    new: int = 512
    least: dict[str, float] = field(default_factory=dict)


CASES = (
    Case("0.6B", SIZES["0.6B"], 256, least={"decode_to_limit": 0.6, "to_transformers": 4.0, "first_token": 1.0}),
    Case("32B", SIZES["32B"], 64, least={"decode_to_limit": 0.75}),
)
SAME = Case("bursts", replace(SIZES["0.6B"], num_hidden_layers=3), 64, new=25)


def asked(case: Case, generator: Generator, new: int) -> list[Request]:
    """Windows that share a prefix, each of about as many tokens as the case wants."""
    encode = generator.tokenizer.encode
    words = "kitchen fridge opened " * (case.prefix + case.own)
    least = len(encode(words)) / len(words)

    def text(tokens: int) -> str:
        return words[: max(1, round(tokens / least))]

    greedy = Sampling(temperature=0, max_new_tokens=new)
    return [Request(str(n), f"{n} {text(case.own)}", f"<|im_start|>{text(case.prefix)}<|im_end|>", 0, greedy) for n in range(case.batch)]


def generator_of(model: Qwen3, case: Case, burst: int | None = None) -> Generator:
    """A generator that draws from the model's whole vocabulary and ends no text early."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.vocab_size, tokenizer.stop_ids = model.config.vocab_size, ()
    room = case.prefix + case.batch * (case.own + case.new)
    return Generator(model, tokenizer, batch=case.batch, cache_tokens=room + room // 4 + 64 * case.batch, burst=burst)


def compare_bursts(record: Record, case: Case, device: str) -> dict[str, float]:
    """Texts of bursts beside those of single steps: until the first token that differs, as rounding may bring about, logprobs agree.

    It is a check, and gives no ratios.
    """
    model, texts = join(random_model(case.config, device)), []
    for burst in (1, 8):
        generator = generator_of(model, case, burst)
        texts.append({done.request.window: done for done in generator.generate(asked(case, generator, case.new))})
    alike, apart = 0, 0.0
    for window, single in texts[0].items():
        burst = texts[1][window]
        same = [one == other for one, other in zip(single.ids, burst.ids, strict=True)]
        common = same.index(False) if False in same else len(same)
        alike += common
        pairs = zip(single.logprobs[:common], burst.logprobs[:common], strict=True)
        apart = max([apart, *(abs(one - other) for one, other in pairs)])
    share = alike / (case.batch * case.new)
    record.checks[f"{case.name}: share of tokens alike"], record.checks[f"{case.name}: logprobs apart"] = round(share, 3), round(apart, 4)
    right, told = share > 0.8 and apart < 0.1, f"{share:.3f} of the tokens alike, logprobs {apart:.4f} apart"
    print(f"{'right' if right else 'wrong'}  bursts and single steps: {told}", flush=True)
    if not right:
        record.wrong.append(f"{case.name}: {told}")
    return {}


def theirs(case: Case, prompts: list[list[int]], device: str) -> float:
    """Seconds of transformers."""
    from transformers import Qwen3Config as TheirConfig
    from transformers import Qwen3ForCausalLM

    with torch.device(device):
        model = Qwen3ForCausalLM(TheirConfig(**case.config.to_dict())).to(as_dtype(case.config.dtype)).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    how = {"min_new_tokens": case.new, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with torch.inference_mode():
        model.generate(ids[:2], **how | {"max_new_tokens": 2, "min_new_tokens": 2, "attention_mask": mask[:2]})
        return seconds(lambda: model.generate(ids, max_new_tokens=case.new, **how))


def limit(case: Case, model: Qwen3, machine: dict) -> float:
    """Seconds that a step takes at least."""
    embedding = 0 if case.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    weights = sum(part.nbytes for part in model.parameters()) - embedding
    cached = (case.prefix + case.batch * (case.own + case.new / 2)) * token_bytes(case.config, model.dtype)
    products = 2 * case.batch * weights / model.dtype.itemsize
    return max((weights + cached) / machine["bytes_per_second"], products / machine["operations_per_second"])


def measure_case(record: Record, case: Case, device: str) -> dict[str, float]:
    """The ratios of one case, what they were taken from printed beside them."""
    model = join(random_model(case.config, device))
    generator = generator_of(model, case)
    requests = asked(case, generator, case.new)
    prompts = [generator.tokenizer.encode(one.prefix + one.prompt) for one in requests]
    for _ in range(2):  # the second time with graphs, and the prefix, at hand
        whole = seconds(lambda: list(generator.generate(requests)))
    begun = seconds(lambda: list(generator.generate(asked(case, generator, 1))))
    step, least = (whole - begun) / (case.new - 1), limit(case, model, record.machine)
    print(f"{case.name}: {case.batch} windows of {len(prompts[0])} tokens, {case.new} new: {whole:.2f} s, prompts {begun:.2f} s")
    print(f"{case.name}: a step {1e3 * step:.2f} ms (limit {1e3 * least:.2f}), {case.batch / step:.0f} tokens/s", flush=True)
    ratios = {"decode_to_limit": least / step}
    if "first_token" in case.least:
        single = asked(case, generator, 1)[:25]
        took = statistics.median([seconds(lambda one=one: list(generator.generate([one]))) for one in single])
        print(f"{case.name}: first token of a window {1e3 * took:.2f} ms", flush=True)
        ratios["first_token"] = SOON / took
    profile(generator, asked(case, generator, 17))
    if "to_transformers" in case.least:
        del generator, model
        other = theirs(case, prompts, device)
        print(f"{case.name}: transformers {other:.2f} s", flush=True)
        ratios["to_transformers"] = other / whole
    return ratios


def profile(generator: Generator, requests: list[Request]) -> None:
    """Where the device's time goes, so that a target that is missed can be seen through."""
    if torch.cuda.is_available():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            list(generator.generate(requests))
        print(found.key_averages().table(sort_by="self_device_time_total", row_limit=15, max_name_column_width=60), flush=True)


def measure(record: Record, deadline: float, cases: tuple[Case, ...] = CASES, same: Case = SAME, device: str = "cuda") -> None:
    """Bursts against single steps, then every case, as long as there is time."""
    for case in (same, *cases):
        if time.monotonic() > deadline:
            record.wrong.append(f"{case.name}: no time left")
            continue
        try:
            ratios = compare_bursts(record, case, device) if case is same else measure_case(record, case, device)
        except Exception:  # counted, told and part of the exit code: the other findings of a rare machine must not be lost
            record.failed(case.name)
            continue
        for name, ratio in ratios.items():
            missed = ratio < case.least.get(name, ratio)
            print(f"{ratio:7.3f}  {case.name}, {name}{'  MISSED' if missed else ''}", flush=True)
        record.ratios |= {f"{case.name}, {name}": round(ratio, 4) for name, ratio in ratios.items()}
        record.save()
