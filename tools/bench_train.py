"""Training of one epoch on the same examples, from the same adapter, by harkd and by transformers + PEFT, each in a process of its own.

    python -m tools.bench_train --like 0.6B --layers 8 --dtype bfloat16       (--windows 8 --like small for less)

Examples: windows of MARBLE behind a prefix cut to 900 tokens; completions of 300 to 600 tokens, the text of the prompt standing in for
reasoning before the true answer. Every contestant takes the examples of each optimiser step together, and clips and updates alike, so that
their final losses must agree:

    harkd      packs with the shared prefix once          alone    harkd, every example with a prefix of its own
    padded     PEFT, batches padded to their longest      packed   PEFT, examples in one row behind each other, positions restarting
    padded-liger, packed-liger                            the same two with Liger's kernels and loss, on a GPU where they are installed
    limit      the bare products of what harkd runs over: two for each linear map (outputs, gradients of inputs), and the head's

Seconds are those of the epoch by the median step, for each of its examples; on a GPU without the first two steps, which compile. On a CPU
they are those of the processor, all threads together, over the number of threads: what other processes take does not count.
The last line is JSON with `ratios`: examples/s of harkd over the best of PEFT's, net peak memory (without what was held before the first
step) for each token in flight of harkd over the least of PEFT's, the gain by the shared prefix, the limit's time over harkd's, and harkd's
final loss over that of PEFT's that is farthest from it. Exit code 1 where they differ by more than 2%, or one failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median

import torch

from harkd.distill.examples import TrainingExample, examples_from_truth
from harkd.distill.losses import accumulate
from harkd.distill.optimiser import AdamW, learning_rate
from harkd.distill.packing import collate, plan
from harkd.homes.dataset import read
from harkd.memory import peak_memory, reset_peak_memory
from harkd.qwen3.config import PROJECTIONS
from harkd.qwen3.lora import LoraConfig, add_lora, save_adapter
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from tools.make_checkpoint import SIZES, make_checkpoint

LORA, LR, CLIP = LoraConfig(16, 32), 2e-4, 1.0
PEFT, LIGER = ("padded", "packed"), ("padded-liger", "packed-liger")
CONTESTANTS = ("harkd", "limit", "alone", *PEFT)


def bench_examples(data: str, model: Path, windows: int, prefix_tokens: int = 900) -> list[TrainingExample]:
    """The examples that everybody trains on."""
    dataset, tokenizer, draw = read(data), load_tokenizer(model), Random(0)
    made = examples_from_truth(dataset.homes, list(dataset.windows("train"))[:windows], tokenizer)
    text, prefix, examples = made[0].prefix, made[0].prefix[-prefix_tokens:], []
    for example in made:
        first = example.mask.index(True)
        answer = example.ids[first:]
        start, n = draw.randrange(len(text) // 2), max(0, draw.randint(300, 600) - len(answer))
        thought = (text * 2)[start : start + n]
        mask = [False] * first + [True] * n + example.mask[first:]
        examples.append(replace(example, prefix=prefix, ids=example.ids[:first] + thought + answer, mask=mask))
    return examples


def train_harkd(folder: Path, examples: Sequence[TrainingExample], steps: Sequence[list[int]], device: str) -> Callable[[int], float]:
    """Step number -> loss."""
    model = load_model(folder, device)
    parameters = add_lora(model, LORA)
    optimiser = AdamW(parameters)

    def step(number: int) -> float:
        optimiser.zero_grad()
        loss = accumulate(model, [[examples[i] for i in steps[number]]]).loss
        norm = optimiser.gradient_norm()
        optimiser.step(learning_rate(number, len(steps), LR, 0.05), min(1.0, CLIP / norm))
        return loss

    return step


def parted(batch: Sequence[TrainingExample], parts: int) -> list[Sequence[TrainingExample]]:
    """A step's examples in so many parts, which PEFT takes one behind the other."""
    size = -(-len(batch) // parts)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def in_flight(name: str, batch: Sequence[TrainingExample], parts: int) -> int:
    """The tokens that a contestant holds at once of a step, padding too."""
    if name not in (*PEFT, *LIGER):
        return len(collate(batch, "cpu").ids)
    rows = [[len(example.prefix) + len(example.ids) for example in part] for part in parted(batch, parts)]
    return max(sum(row) if name.startswith("packed") else len(row) * max(row) for row in rows)


def train_peft(
    folder: Path, examples: Sequence[TrainingExample], steps: Sequence[list[int]], device: str, name: str, parts: int
) -> Callable[[int], float]:
    """Step number -> loss; starts from harkd's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    packed = name.startswith("packed")

    base = load_model(folder, device)
    save_adapter(folder / "adapter", add_lora(base, LORA), LORA, str(folder), {})
    del base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").to(device)
    if name in LIGER:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(model=model)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, weight_decay=0.0)

    def inputs(batch: list[TrainingExample]) -> dict[str, torch.Tensor]:
        rows = [example.prefix + example.ids for example in batch]
        labels = [[-100] * len(e.prefix) + [id if learnt else -100 for id, learnt in zip(e.ids, e.mask, strict=True)] for e in batch]
        if packed:
            flat = {"input_ids": sum(rows, []), "labels": sum(labels, []), "position_ids": [i for row in rows for i in range(len(row))]}
            return {name: torch.tensor([values], device=device) for name, values in flat.items()}
        width = max(map(len, rows))
        fill = {"input_ids": (rows, 0), "labels": (labels, -100), "attention_mask": ([[1] * len(row) for row in rows], 0)}
        padded = {name: [row + [pad] * (width - len(row)) for row in values] for name, (values, pad) in fill.items()}
        return {name: torch.tensor(values, device=device) for name, values in padded.items()}

    def step(number: int) -> float:
        optimiser.zero_grad()
        batch = [examples[i] for i in steps[number]]
        supervised, loss = sum(sum(example.mask) for example in batch), 0.0
        for part in parted(batch, parts):
            # without a cache: with one, transformers does not see from the positions that a row holds several examples
            found = model(**inputs(part), num_items_in_batch=supervised, use_cache=False).loss
            found.backward()
            loss += found.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(number, len(steps), LR, 0.05)
        optimiser.step()
        return loss

    return step


def limit(folder: Path, examples: Sequence[TrainingExample], steps: Sequence[list[int]], device: str) -> Callable[[int], float]:
    """Step number -> 0: the products alone."""
    model = load_model(folder, device)
    maps = [module.weight for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    most, widths = max(len(collate([examples[i] for i in step], "cpu").ids) for step in steps), {weight.shape[1] for weight in maps}
    noise = {n: torch.randn(most, n, dtype=maps[0].dtype, device=device) for n in widths}  # a GPU multiplies ones faster than data

    @torch.no_grad()
    def step(number: int) -> float:
        batch = collate([examples[i] for i in steps[number]], device)
        for rows, weights in ((len(batch.ids), maps), (len(batch.rows), [model.head_weight])):
            for weight in weights:
                x = noise[weight.shape[1]][:rows]
                for part in x.split(512) if weight is model.head_weight else (x,):
                    torch.nn.functional.linear(part, weight) @ weight
        return 0.0

    return step


def one(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run one contestant over the epoch: seconds, net peak bytes, losses."""
    examples = bench_examples(args.data, folder, args.windows)
    steps = plan(examples, args.batch_tokens, seed=0, epoch=0)
    if name == "alone":
        examples = [replace(e, prefix=[], ids=e.prefix + e.ids, mask=[False] * len(e.prefix) + e.mask) for e in examples]
    build = {"harkd": train_harkd, "alone": train_harkd, "limit": limit}.get(name)
    take = build(folder, examples, steps, args.device) if build else train_peft(folder, examples, steps, args.device, name, args.parts)
    reset_peak_memory()
    kind = "cuda" if "cuda" in peak_memory() else "cpu"
    clock = time.perf_counter if kind == "cuda" else lambda: time.process_time() / torch.get_num_threads()
    before, losses, took = peak_memory(), [], []
    for number, step in enumerate(steps):
        began = clock()
        losses.append(take(number))  # it ends with the loss on the host
        if name == "limit" and kind == "cuda":
            torch.cuda.synchronize()
        took.append((clock() - began) / len(step))
    cold = 2 if kind == "cuda" and len(steps) > 2 else 0  # steps in which kernels are compiled
    seconds = len(examples) * median(took[cold:])
    supervised = sum(sum(example.mask) for example in examples)
    return {
        "examples_per_s": len(examples) / seconds, "supervised_per_s": supervised / seconds, "seconds": seconds,
        "net_peak_bytes": peak_memory()[kind] - before[kind], "first_loss": losses[0], "final_loss": losses[-1],
        "examples_per_step": len(examples) / len(steps),
        "tokens_in_flight": max(in_flight(name, [examples[i] for i in step], args.parts) for step in steps),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="marble:../shared/data/marble/dataset")
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/qwen3"))
    parser.add_argument("--like", choices=SIZES, default="0.6B")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--parts", type=int, default=2, help="of a step, one behind the other, for PEFT; more need less memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]), args)))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(SIZES[args.like], num_hidden_layers=args.layers, dtype=args.dtype)
        make_checkpoint(Path(folder), args.tokenizer, config, device=args.device)
        liger = args.device.startswith("cuda") and find_spec("liger_kernel")
        names = (*CONTESTANTS, *(LIGER if liger else ()))
        for name in names:
            again = [sys.executable, "-m", "tools.bench_train", *(sys.argv[1:] if argv is None else argv), "--one", name, folder]
            done = subprocess.run(again, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name:8}  failed, exit code {done.returncode}", flush=True)  # its own message stands on stderr
                continue
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:8}" + "".join(f"  {key} {value:.6g}" for key, value in found[name].items()), flush=True)
    peft = [found[name] for name in (*PEFT, *LIGER) if name in found]
    if not peft or not {"harkd", "alone", "limit"} <= set(found):
        print("bench_train: no ratios without harkd, alone, limit and one of PEFT's", file=sys.stderr)
        return 1
    speed, memory = (lambda name: found[name]["examples_per_s"]), (lambda row: row["net_peak_bytes"] / row["tokens_in_flight"])
    ratios = {
        "examples_to_peft": speed("harkd") / max(row["examples_per_s"] for row in peft),
        "memory_to_peft": memory(found["harkd"]) / min(map(memory, peft)),
        "shared_prefix_gain": speed("harkd") / speed("alone"), "to_limit": speed("harkd") / speed("limit"),
        "loss_to_peft": max((found["harkd"]["final_loss"] / row["final_loss"] for row in peft), key=lambda ratio: abs(ratio - 1)),
    }  # fmt: skip
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, {args.like}, {args.layers} layers, {args.dtype}")
    print(json.dumps({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}))
    if not abs(ratios["loss_to_peft"] - 1) < 0.02:
        print("bench_train: the final losses differ, so the contestants did not do the same work", file=sys.stderr)
        return 1
    return int(len(found) < len(names))


if __name__ == "__main__":
    sys.exit(main())
