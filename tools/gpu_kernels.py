"""What tools/gpu_check.py checks and measures of harkd.kernels: cases, baselines, bytes and operations.

Shapes are those of Qwen3-0.6B and 32B. A baseline's name says what it computes; Liger and PEFT stand in the table where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from harkd.kernels.attention import CacheLayer, Sequences, attention
from harkd.kernels.divergence import KINDS, divergence
from harkd.kernels.lora import lora_linear
from harkd.kernels.loss import cross_entropy, logits_of
from harkd.kernels.rms_norm import add_rms_norm, rms_norm
from harkd.kernels.rope import norm_rope, rotary
from harkd.kernels.swiglu import swiglu
from tools.gpu_baselines import addmm_lora, compiled, eager_lora, flash, flex, liger, peft_lora
from tools.gpu_check import Bench, Check, both, forward
from tools.gpu_plans import REAL, Setting, cached_plan, mixed_plan, packed_plans  # noqa: F401, the tool takes REAL from here

EPS, SCALE = 1e-6, 2.0


@dataclass(frozen=True)
class Group:
    """Projections of one input: x, all A and all B are trained, the weights frozen."""

    trained: list[Tensor]
    weights: list[Tensor]


def lora_groups(setting: Setting, width: int, queries: int, keys: int, mlp: int, tokens: int) -> list[Group]:
    """q, k, v; o; gate, up; down of one layer."""
    groups, draw, rank = [], setting.draw, setting.rank
    for inputs, outputs in ((width, (queries, keys, keys)), (queries, (width,)), (width, (mlp, mlp)), (mlp, (width,))):
        a = [draw(rank, inputs, std=inputs**-0.5) for _ in outputs]
        b = [draw(n, rank, std=rank**-0.5) for n in outputs]
        groups.append(Group([draw(tokens, inputs), *a, *b], [draw(n, inputs, std=inputs**-0.5) for n in outputs]))
    return groups


def lora(n: int, backend: str, x: Tensor, *rest: Tensor) -> list[Tensor]:
    return lora_linear(x, rest[2 * n :], rest[:n], rest[n : 2 * n], SCALE, backend)


def rope_inputs(setting: Setting) -> list[Tensor]:
    (heads, kv_heads), tokens = setting.heads[0], setting.wide[0]
    angles = rotary(torch.arange(tokens, device=setting.device), setting.dim, 1e6, setting.dtype)
    return [*setting.queries(tokens, heads, kv_heads)[:2], setting.draw(setting.dim), setting.draw(setting.dim), *angles]


def checks(setting: Setting) -> Iterator[Check]:
    """Every kernel against its reference, at real sizes."""
    for heads, kv_heads in (*setting.heads, setting.checked):
        for name, plan in packed_plans(setting).items():
            inputs = setting.queries(int(plan.cu_q[-1]), heads, kv_heads)
            yield Check(f"packed attention, {name}, {heads}/{kv_heads}", partial(_packed, plan), inputs, 3)
        plan, layer = cached_plan(setting, setting.batches[-2], setting.keys[1], kv_heads)
        inputs = [*setting.queries(len(plan.past), heads, kv_heads), *layer]
        yield Check(f"cached attention, {heads}/{kv_heads}", partial(_cached, plan), inputs, 0)
        plan, layer = cached_plan(setting, setting.batches[-2], setting.keys[0], kv_heads, setting.shared[0])
        inputs = [*setting.queries(len(plan.past), heads, kv_heads), *layer]
        yield Check(f"cached attention, many behind a prefix, {heads}/{kv_heads}", partial(_cached, plan), inputs, 0)
        for small in dict.fromkeys((setting, replace(setting, dim=setting.dim // 2))):
            plan, layer = mixed_plan(small, kv_heads)
            inputs = [*small.queries(sum(setting.new), heads, kv_heads), *layer]
            yield Check(f"cached attention behind a prefix, {heads}/{kv_heads}, head_dim {small.dim}", partial(_cached, plan), inputs, 0)
    small, (heads, kv_heads) = replace(setting, dim=setting.dim // 2), setting.heads[0]
    plan = packed_plans(small)["shared prefix"]
    inputs = small.queries(int(plan.cu_q[-1]), heads, kv_heads)
    yield Check(f"packed attention, shared prefix, {heads}/{kv_heads}, head_dim {small.dim}", partial(_packed, plan), inputs, 3)
    for group in lora_groups(setting, *setting.layers[0][1:], setting.tokens[0]):
        n = len(group.weights)
        name = f"LoRA, {n} x {tuple(group.weights[0].shape)}"
        yield Check(name, partial(lora, n), [*group.trained, *group.weights], len(group.trained))
    x, y, weight = setting.draw(*setting.wide), setting.draw(*setting.wide), setting.draw(setting.wide[1])
    yield Check("RMSNorm", lambda backend, *inputs: rms_norm(*inputs, EPS, backend), [x, weight], 2)
    yield Check("add and RMSNorm", lambda backend, *inputs: add_rms_norm(*inputs, EPS, backend), [x, y, weight], 3)
    yield Check("SwiGLU", lambda backend, *inputs: swiglu(*inputs, backend), [x, y], 2)
    yield Check("norms and RoPE", lambda backend, *inputs: norm_rope(*inputs, EPS, backend), rope_inputs(setting), 4)
    hidden, head = setting.draw(256, setting.width), setting.draw(setting.vocab, setting.width, std=setting.width**-0.5)
    targets = torch.randint(setting.vocab, (256,), device=setting.device)
    yield Check("vocabulary loss", partial(_either_loss, targets), [hidden, head], 1)


def _packed(plan: Sequences, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, plan, backend=backend)


def _cached(plan: Sequences, backend: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return attention(q, k, v, plan, CacheLayer(keys.clone(), values.clone()), backend)


def _either_loss(targets: Tensor, backend: str, hidden: Tensor, head: Tensor) -> Tensor:
    """There is no kernel: the chunked loss stands against torch's."""
    if backend == "triton":
        return cross_entropy(hidden, head, targets)
    return F.cross_entropy(logits_of(hidden, head), targets, reduction="none")


def benches(setting: Setting) -> Iterator[Bench]:
    """All measurements, what matters most first; last what may not be captured in a graph (Liger's loss waits for the device)."""
    for part in (packed_benches, cached_benches, prefix_benches, lora_benches, element_benches, loss_benches):
        yield from part(setting)
    yield from packed_benches(setting, flex_attention=True)


def packed_benches(setting: Setting, flex_attention: bool = False) -> Iterator[Bench]:
    """Beside Flash or, of the first heads alone, FlexAttention, whose compilation takes longest of all."""
    prefix, examples, tail = setting.shared
    plans, named = packed_plans(setting), "FLASH_ATTENTION, separate sequences"
    for heads, kv_heads in setting.heads[: 1 if flex_attention else None]:
        for name, rows, columns in (("pack", *setting.pack), ("shared prefix", examples, prefix + tail)):
            plan = plans[name]
            qkv = setting.queries(int(plan.cu_q[-1]), heads, kv_heads)
            if flex_attention:
                theirs = [x.transpose(0, 1)[None].contiguous() for x in qkv]
            else:
                theirs = [setting.draw(rows, n, columns, setting.dim) for n in (heads, kv_heads, kv_heads)]
            lengths = plan.cu_q.diff().tolist()
            pairs = sum(n * (n + 1) // 2 + n * prefix * (g >= 0) for n, g in zip(lengths, plan.prefix_of.tolist(), strict=True))
            for direction, run, work, least in (("forward", forward, 4, 1.0), ("forward+backward", both, 14, 0.85)):
                flexible = {"FlexAttention, same mask": partial(_flex, run, plan, theirs)}
                yield Bench(
                    f"packed attention, {name}, {heads}/{kv_heads}, {direction}",
                    {"": run(partial(_packed, plan, "triton"), *qkv)},
                    flexible if flex_attention else {named: run(flash, *theirs)},
                    operations=work * heads * setting.dim * pairs,
                    targets={named: least if name == "pack" else 1.3, "FlexAttention, same mask": 1.0},
                )


def _flex(run: Callable, plan: Sequences, inputs: list[Tensor]) -> Callable:
    return run(flex(plan), *inputs)()


def cached_benches(setting: Setting) -> Iterator[Bench]:
    alike, grouped = "SDPA, contiguous cache", "SDPA, contiguous cache, a group's heads as rows"
    attend = F.scaled_dot_product_attention
    for heads, kv_heads in setting.heads:
        for batch in setting.batches:
            for keys in setting.keys:
                plan, layer = cached_plan(setting, batch, keys, kv_heads)
                q, k, v = setting.queries(batch, heads, kv_heads)
                own = [setting.draw(batch, kv_heads, keys, setting.dim) for _ in range(2)]
                size = 2 * own[0].numel() * q.element_size()
                yield Bench(
                    f"cached attention, {heads}/{kv_heads}, batch {batch}, {keys} keys",
                    {"": forward(attention, q, k, v, plan, layer, "triton")},
                    {
                        alike: forward(partial(attend, enable_gqa=True), q.view(batch, heads, 1, -1), *own),
                        grouped: forward(attend, q.view(batch, kv_heads, -1, setting.dim), *own),
                    },
                    bytes=size,
                    targets={alike: 1.0, grouped: 1.0} | ({"limit": 0.8} if size > 256e6 else {}),
                )


def prefix_benches(setting: Setting) -> Iterator[Bench]:
    """Many sequences behind one prefix, beside as many that hold the same keys each for itself."""
    prefix, batch, own, apart = setting.shared[0], setting.batches[-1], setting.keys[0], "a prefix for each sequence"
    for heads, kv_heads in setting.heads:
        inputs = setting.queries(batch, heads, kv_heads)
        yield Bench(
            f"cached attention, {heads}/{kv_heads}, batch {batch}, {own} keys behind {prefix} shared ones",
            {"": forward(attention, *inputs, *cached_plan(setting, batch, own, kv_heads, prefix), "triton")},
            {apart: forward(attention, *inputs, *cached_plan(setting, batch, prefix + own, kv_heads), "triton")},
            bytes=2 * (prefix + batch * own) * kv_heads * setting.dim * setting.dtype.itemsize,
            targets={apart: 1.3, "limit": 0.6},
        )


def lora_benches(setting: Setting) -> Iterator[Bench]:
    """Forward and gradients of one layer's seven projections; the base products' gradient is that of the inputs alone."""
    for tokens in setting.tokens:
        for name, *sizes in setting.layers:
            groups, base = lora_groups(setting, *sizes, tokens), "frozen base products alone"
            largest = {base: 1 / (1.35 if name == "0.6B" else 1.12)} if tokens == setting.tokens[0] else {}
            kinds = {
                base: lambda g: both(lambda x: [F.linear(x, weight) for weight in g.weights], g.trained[0])(),
                "eager LoRA": lambda g: both(partial(eager_lora, g.weights, SCALE), *g.trained)(),
                "addmm_": lambda g: addmm_lora(g.weights, SCALE, *g.trained),
            }
            if find_spec("peft"):
                kinds["PEFT"] = lambda g: peft_lora(g.weights, SCALE, g.trained[0], setting.rank)
            yield Bench(
                f"LoRA, one layer of {name}, {tokens} tokens, r {setting.rank}, forward+backward",
                {"": partial(together, _ours, groups)},
                {label: partial(together, kind, groups) for label, kind in kinds.items()},
                operations=4 * tokens * sum(w.numel() for g in groups for w in g.weights),
                targets={"eager LoRA": 1.0, "PEFT": 1.0} | largest,
            )


def together(build: Callable[[Group], Callable], groups: Sequence[Group]) -> Callable[[], object]:
    functions = [build(group) for group in groups]
    return lambda: [function() for function in functions]


def _ours(group: Group) -> Callable:
    n = len(group.weights)
    return both(lambda *trained: lora(n, "triton", *trained, *group.weights), *group.trained)()


def element_benches(setting: Setting) -> Iterator[Bench]:
    """Norms, rotation and SwiGLU; the weights of norms are frozen, as under LoRA. Bytes are those of a separate forward and backward."""
    x, y, weight = setting.draw(*setting.wide), setting.draw(*setting.wide), setting.draw(setting.wide[1])
    q, k, *others = rope_inputs(setting)
    theirs = {
        "RMSNorm": lambda run: run(partial(liger("LigerRMSNormFunction"), weight=weight, eps=EPS), x)(),
        "SwiGLU": lambda run: run(liger("LigerSiLUMulFunction"), x, y)(),
    }
    size, heads = x.numel() * x.element_size(), (q.numel() + k.numel()) * q.element_size()
    for name, function, inputs, moved in (
        ("RMSNorm", lambda backend, x: rms_norm(x, weight, EPS, backend), (x,), (2 * size, 5 * size)),
        ("add and RMSNorm", lambda backend, h, x: add_rms_norm(h, x, weight, EPS, backend), (x, y), (4 * size, 8 * size)),
        ("SwiGLU", lambda backend, gate, up: swiglu(gate, up, backend), (x, y), (3 * size, 8 * size)),
        ("norms and RoPE", lambda backend, q, k: norm_rope(q, k, *others, EPS, backend), (q, k), (2 * heads, 5 * heads)),
    ):
        for direction, run, count in zip(("forward", "forward+backward"), (forward, both), moved, strict=True):
            baselines = {"torch.compile": partial(lambda run, f, i: run(compiled(partial(f, "torch")), *i)(), run, function, inputs)}
            if name in theirs and find_spec("liger_kernel"):
                baselines["Liger"] = partial(theirs[name], run)
            targets = {"torch.compile": 1.0, "Liger": 1.0} | ({"limit": 0.85} if inputs[0].nbytes > 64e6 else {})
            yield Bench(f"{name}, {direction}", {"": run(partial(function, "triton"), *inputs)}, baselines, count, targets=targets)


def loss_benches(setting: Setting) -> Iterator[Bench]:
    """Cross-entropy and divergences of all rows under a frozen head."""
    hidden, teacher = (setting.draw(setting.rows, setting.width) for _ in range(2))
    head, teacher_head = (setting.draw(setting.vocab, setting.width, std=setting.width**-0.5) for _ in range(2))
    targets = torch.randint(setting.vocab, (setting.rows,), device=setting.device)

    def in_chunks() -> Callable:
        step = compiled(lambda hidden, targets: F.cross_entropy(logits_of(hidden, head), targets, reduction="none"))
        parts = list(zip(range(0, setting.rows, 512), targets.split(512), strict=True))
        runs = [both(lambda h, t=t: step(h, t), hidden[start : start + 512])() for start, t in parts]
        return lambda: [run() for run in runs]

    def fused() -> Callable:
        function = liger("LigerFusedLinearCrossEntropyFunction")
        return both(lambda h: function(h, head, targets)[0], hidden)()

    ours = {f"chunk {n}": both(partial(cross_entropy, head=head, targets=targets, chunk=n), hidden) for n in (512, 2048, 8192)}
    baselines = {"torch.compile, chunks of 512": in_chunks} | ({"Liger": fused} if find_spec("liger_kernel") else {})
    work = 4 * setting.rows * setting.width * setting.vocab
    yield Bench("vocabulary loss, forward+backward", ours, baselines, operations=work, targets={"Liger": 1.0}, peak=1.5e9)
    rest = {"head": head, "teacher_hidden": teacher, "teacher_head": teacher_head}
    kinds = {kind: both(partial(divergence, kind=kind, **rest), hidden) for kind in KINDS}
    yield Bench("divergence to a teacher of equal width, forward+backward", kinds, operations=work * 1.5, peak=1.5e9)
