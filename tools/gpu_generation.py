"""What gpu_check measures of generation: whole models of random weights, at the shapes of Qwen3-0.6B and of 32B.

    decode_to_limit    what a step must read: the weights, the prefix's part of the cache once and each window's own, its text half written,
                       at the bandwidth measured (or what it must multiply, if that takes longer) / harkd's seconds of a step, the median
                       over the bursts in which all windows write
    to_transformers    transformers' seconds of `generate` over whole prompts, in the same dtype and batch, all at once / harkd's
    first_token        15 ms / the median time to the first token of one window behind a prefix in the cache

First small models write the same texts in bursts, as graphs, and in single steps, in float16, whose logprobs are fine enough to be set side
by side. Tokens are drawn from Qwen3's whole vocabulary. Last comes where the time goes, of cases that miss their aim.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
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
from harkd.sampling.generator import BURST, Generator
from harkd.sampling.request import Request, Sampling, recommended
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
    sampling: Sampling = Sampling(temperature=0)


CASES = (
    Case("0.6B", SIZES["0.6B"], 256, least={"decode_to_limit": 0.6, "to_transformers": 4.0, "first_token": 1.0}),
    Case("32B", SIZES["32B"], 64, least={"decode_to_limit": 0.75}),
)
SMALL = replace(SIZES["0.6B"], num_hidden_layers=3, dtype="float16")
SAME = (Case("bursts", SMALL, 64, new=25), Case("sampled bursts", SMALL, 32, new=25, sampling=recommended(True)))


def asked(case: Case, encode: Callable[[str], list[int]], new: int) -> list[Request]:
    """Windows that share a prefix, each of about as many tokens as the case wants."""
    words = "kitchen fridge opened " * (case.prefix + case.own)
    least = len(encode(words)) / len(words)

    def text(tokens: int) -> str:
        return words[: max(1, round(tokens / least))]

    how = replace(case.sampling, max_new_tokens=new)
    return [Request(str(n), f"{n} {text(case.own)}", f"<|im_start|>{text(case.prefix)}<|im_end|>", 0, how) for n in range(case.batch)]


def generator_of(model: Qwen3, case: Case, burst: int | None = None) -> Generator:
    """A generator that draws from the model's whole vocabulary and ends no text early."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.vocab_size, tokenizer.stop_ids = model.config.vocab_size, ()
    room = case.prefix + case.batch * (case.own + case.new)
    return Generator(model, tokenizer, batch=case.batch, cache_tokens=room + room // 4 + 64 * case.batch, burst=burst)


Ratios = Iterator[tuple[str, float]]  # as they are found


def compare_bursts(record: Record, case: Case, device: str) -> Ratios:
    """Texts of bursts beside those of single steps: until the first token that differs, as rounding may bring about, logprobs agree.

    It is a check, and gives no ratios.
    """
    model, texts = join(random_model(case.config, device)), []
    for burst in (1, 8):
        generator = generator_of(model, case, burst)
        texts.append({done.request.window: done for done in generator.generate(asked(case, generator.tokenizer.encode, case.new))})
    if device == "cuda" and not generator.burst.graphs:
        record.wrong.append(f"{case.name}: no graph was made")
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
    yield from ()


def theirs(record: Record, case: Case, device: str) -> Ratios:
    """transformers beside the seconds that harkd took."""
    from transformers import Qwen3Config as TheirConfig
    from transformers import Qwen3ForCausalLM

    encode = load_tokenizer(str(TOKENIZER)).encode
    prompts = [encode(one.prefix + one.prompt) for one in asked(case, encode, case.new)]
    with torch.device(device):
        model = Qwen3ForCausalLM(TheirConfig(**case.config.to_dict())).to(as_dtype(case.config.dtype)).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    how = {"min_new_tokens": case.new, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with torch.inference_mode():
        model.generate(ids[:2], **how | {"max_new_tokens": 2, "min_new_tokens": 2, "attention_mask": mask[:2]})
        took = seconds(lambda: model.generate(ids, max_new_tokens=case.new, **how))
    print(f"{case.name}: transformers {took:.2f} s", flush=True)
    yield "to_transformers", took / record.seconds[f"{case.name}, whole"]


def limit(case: Case, model: Qwen3, machine: dict) -> float:
    """Seconds that a step takes at least."""
    embedding = 0 if case.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    weights = sum(part.nbytes for part in model.parameters()) - embedding
    cached = (case.prefix + case.batch * (case.own + case.new / 2)) * token_bytes(case.config, model.dtype)
    products = 2 * case.batch * weights / model.dtype.itemsize
    return max((weights + cached) / machine["bytes_per_second"], products / machine["operations_per_second"])


def decoded(generator: Generator, requests: list[Request]) -> tuple[float, float, int]:
    """Seconds of the whole, of a step while most of the requests write at once (the median), and how many these are.

    A step's time runs from the end of one burst to the end of the next, with what the host does in between.
    """
    ends: list[tuple[int, int, float]] = []  # sequences, tokens of each, when; (0, 0, ...) of a step that took prompts in

    def noted(function: Callable) -> Callable:
        def note(*given: object) -> object:
            found = function(*given)  # its results are on the host then
            ends.append((len(found or ()), max(map(len, found or ()), default=0), time.perf_counter()))
            return found

        return note

    generator.burst.write, generator._step = noted(generator.burst.write), noted(generator._step)
    try:
        whole = seconds(lambda: list(generator.generate(requests)))
    finally:
        del generator.burst.write, generator._step
    most = max(rows for rows, _, _ in ends)
    steps = [(end - begin) / n for (rows, _, begin), (same, n, end) in zip(ends, ends[1:]) if rows == same == most]
    return whole, statistics.median(steps), most


def measure_case(record: Record, case: Case, device: str) -> Ratios:
    """What harkd takes, printed beside the ratios."""
    model = join(random_model(case.config, device))
    generator = generator_of(model, case, BURST)
    encode = generator.tokenizer.encode
    requests = asked(case, encode, case.new)
    list(generator.generate(requests))  # from now on graphs, and the prefix, are at hand
    whole, step, rows = decoded(generator, requests)
    least = limit(replace(case, batch=rows), model, record.machine)
    record.seconds |= {f"{case.name}, whole": whole, f"{case.name}, step": step, f"{case.name}, limit of a step": least}
    print(f"{case.name}: {case.batch} windows, {case.new} new: {whole:.2f} s, with prompts {case.batch * case.new / whole:.0f} tokens/s")
    print(f"{case.name}: a step of {rows} {1e3 * step:.2f} ms (limit {1e3 * least:.2f}), {rows / step:.0f} tokens/s", flush=True)
    yield "decode_to_limit", least / step
    if "first_token" in case.least:
        single = asked(case, encode, 1)[:25]
        took = statistics.median([seconds(lambda one=one: list(generator.generate([one]))) for one in single])
        print(f"{case.name}: first token of a window {1e3 * took:.2f} ms", flush=True)
        yield "first_token", SOON / took


def profile(record: Record, case: Case, device: str) -> Ratios:
    """Where the device's time goes, so that an aim that is missed can be seen through; no ratios."""
    generator = generator_of(join(random_model(case.config, device)), case, BURST)
    requests = asked(case, generator.tokenizer.encode, 1 + BURST)
    list(generator.generate(requests))
    kinds = [torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as found:
        list(generator.generate(requests))
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60), flush=True)
    yield from ()


def measure(record: Record, deadline: float, cases: tuple[Case, ...] = CASES, same: tuple[Case, ...] = SAME, device: str = "cuda") -> None:
    """Bursts against single steps, every case, then transformers, as long as there is time; each ratio is saved at once."""
    beside = [case for case in cases if "to_transformers" in case.least]
    behind = (case for case in cases if record.ratios.get(f"{case.name}, decode_to_limit", 1e9) < case.least.get("decode_to_limit", 0))
    works = ((compare_bursts, same), (measure_case, cases), (theirs, beside), (profile, behind))  # who is behind shows at the end
    for work, case in ((work, case) for work, of in works for case in of):
        if time.monotonic() > deadline:
            record.skip(f"{case.name}, {work.__name__}")
            continue
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        try:
            for name, ratio in work(record, case, device):
                missed = ratio < case.least.get(name, ratio)
                print(f"{ratio:7.3f}  {case.name}, {name}{'  MISSED' if missed else ''}", flush=True)
                record.ratios[f"{case.name}, {name}"] = round(ratio, 4)
                record.save()
        except Exception:  # counted, told and part of the exit code: the other findings of a rare machine must not be lost
            record.failed(f"{case.name}, {work.__name__}")
    record.save()
