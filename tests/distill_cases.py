"""Small traces, examples and models for the tests of harkd.distill."""

import random
from dataclasses import replace

import torch

from harkd.distill.examples import Choice, TrainingExample
from harkd.distill.traces import Trace, agreement
from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.lora import LoraConfig, add_lora
from harkd.qwen3.model import Qwen3, initialise

VOCAB = 48
CONFIG = Qwen3Config(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    tie_word_embeddings=True,
)  # fmt: skip


def make_trace(window="home/r1/0001", sample=0, answer=("COOKING", "EATING"), truth=(("COOKING",), ("EATING",)), **changes):
    fields = {
        "data": "marble:dataset", "home": "home", "group": "g1", "recording": "r1", "window": window, "sample": sample,
        "labels": ["COOKING", "EATING"],
        "messages": [
            {"role": "system", "content": "You name activities.\nÀ la carte: \u2028 COOKING, EATING"},
            {"role": "user", "content": "[fridge, chair]"},
            {"role": "assistant", "reasoning_content": "The fridge, then the chair.", "content": "Sure: ..."},
        ],
        "answer": list(answer), "causes": {}, "truth": [list(true) for true in truth], "agreement": agreement(answer, truth),
        "tokens": {"prompt": 90, "completion": 30}, "finish_reason": "stop", "seed": 7, "model": "teacher", "thinking": True,
        "template": "1", "answer_form": "1",
    }  # fmt: skip
    return Trace(**{**fields, **changes})


def make_examples(count, homes=2, seed=0, longest=9):
    """Examples of random tokens; example i belongs to home i % homes, whose prefix has 5 + its number tokens."""
    draw = random.Random(seed)
    prefixes = [[draw.randrange(VOCAB) for _ in range(5 + home)] for home in range(homes)]
    examples = []
    for i in range(count):
        length = draw.randint(4, longest)
        mask = [False, False] + [draw.random() < 0.7 for _ in range(length - 3)] + [True]
        ids = [draw.randrange(VOCAB) for _ in range(length)]
        examples.append(TrainingExample(prefixes[i % homes], ids, mask, f"home{i % homes}/r/{i:04d}"))
    return examples


def with_choices(examples, seed=0):
    """The examples, each with choices between three tokens at its first and last supervised token."""
    draw = random.Random(seed)
    made = []
    for example in examples:
        learnt = [t for t, supervised in enumerate(example.mask) if supervised]
        p = [draw.random() for _ in range(3)]
        places = dict.fromkeys((learnt[0], learnt[-1]))
        choices = tuple(Choice(at, tuple(draw.sample(range(VOCAB), 3)), tuple(x / sum(p) for x in p)) for at in places)
        made.append(replace(example, choices=choices))
    return made


def make_teacher(dtype=torch.float64, seed=9, **changes):
    """Another tiny Qwen3, of another width."""
    config = replace(CONFIG, **{"hidden_size": 24, "num_hidden_layers": 1, **changes})
    return initialise(Qwen3(config).to(dtype), seed, std=0.3).requires_grad_(False)


def write(model, examples, seed):
    """A rollout: as many tokens as each example supervises, drawn one by one from the student's own distribution."""
    generator, made = torch.Generator().manual_seed(seed), []
    for example in examples:
        first, ids = example.mask.index(True), list(example.ids)
        for t in range(first, len(ids)):
            with torch.no_grad():
                p = model.logits(example.prefix + ids[:t])[-1].softmax(-1)
            ids[t] = int(torch.multinomial(p, 1, generator=generator))
        made.append(replace(example, ids=ids, mask=[t >= first for t in range(len(ids))]))
    return made


def make_model(dtype=torch.float64, seed=0, lora=True, **changes):
    """A tiny Qwen3 and the parameters to train: an adapter's (with B drawn, so that every gradient counts) or all."""
    model = initialise(Qwen3(replace(CONFIG, **changes)).to(dtype), seed, std=0.2)
    if not lora:
        return model, dict(model.named_parameters())
    parameters = add_lora(model, LoraConfig(r=3, alpha=6), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, parameters
