"""Pretrain nano-teacher and nano-student on simulated homes: the same recipe, corpus and number of tokens, and only the size differs.

    python -m tools.pretrain_nano runs/nano            (50 minutes on one core; the same command goes on where it was stopped)

1. A byte-level BPE tokenizer with Qwen3's split and special tokens, from the prompts and answers of the first homes of family P, which
   have few words, and from MARBLE's prompt and the text of the licence, so that other homes' words do not fall to pieces.
2. Names: --names homes of P of which a prompt tells only what their activities are called; the thought says it of each activity, in any
   order. It is here that a model learns to look a name up in a list, which it hardly learns from events.
3. Drills: --drills other homes of which a prompt tells no more, and two to five events from all over a day.
4. Homes: the whole prompts of --homes others with --windows windows each, and then of as many more: the learning rate rises once again.
   These have true answers, most of them behind a thought made from the truth; the loss is on answers alone.
5. Two Qwen3 models, trained from random weights by the package's own packing, optimiser and loop, on each home once. The learning rate at
   its peak is --lr over the model's width.

After each stage a model is written as a Hugging Face folder, its tensors in bfloat16, with which the next one begins; the last one ships.
`tools/results/` keeps the log. No home of families D and T is ever seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from harkd.distill.examples import TrainingExample, true_answer
from harkd.distill.loop import LoopSettings, train
from harkd.files import read_json, write_json
from harkd.homes.answer import canonical
from harkd.homes.dataset import Dataset, read
from harkd.homes.events import Home, Recording, Window
from harkd.homes.prompt import prompt, system_message
from harkd.homes.readers import marble_home
from harkd.homes.simulated import house, reasoning
from harkd.homes.simulated_world import MOTION_NAMES
from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.model import Qwen3, initialise
from harkd.qwen3.tokenizer import Tokenizer, load_tokenizer, render_example
from harkd.qwen3.weights import load_model, save_model

# Qwen3's split into words: contractions, words, single digits, punctuation, line ends, blanks
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")  # ordinary added tokens in Qwen3: skipping special tokens keeps them
VOCABULARY = 2048
SIZES = {  # hidden, intermediate, layers, heads, key/value heads
    "nano-teacher": (192, 512, 4, 4, 4),
    "nano-student": (64, 160, 2, 2, 2),
}
TOKENIZER_HOMES, HELD_OUT, NAMING, DRILLS = 300, 10**6, 10**7, 2 * 10**7  # how many, and the first number of the others
REASONED = 0.875  # share of the answers that stand behind a thought
LICENCE = Path(__file__).parents[1] / "LICENSE"


def train_tokenizer(texts: Iterator[str] | list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as Qwen3's, of `vocab_size` tokens with the special ones."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = vocab_size - len(SPECIAL) - len(THINK)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK])
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as a Qwen3 folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {id: token.__getstate__() for id, token in tokenizer.get_added_tokens_decoder().items()}
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None,
        "add_prefix_space": False, "model_max_length": 4096, "added_tokens_decoder": added,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)


def scattered(day: Recording, rng: Random) -> Window:
    """Ten events from all over a day, in their order, that tell by themselves what they belong to."""
    telling = [event for event in day.events() if event.sensor not in MOTION_NAMES]
    chosen = sorted(rng.sample(range(len(telling)), min(10, len(telling))))
    return Window(f"{day.home.name}/{day.id}/scattered", day.home.name, day.group, day.id, tuple(telling[i] for i in chosen))


class Lesson(NamedTuple):
    """A conversation about a window, or about a home, that ends with the true answer, with reasoning or without."""

    about: str
    messages: list[dict[str, str]]
    thinking: bool


def lesson(home: Home, window: Window, rng: Random) -> Lesson:
    """The prompt of a window and its true answer, in a share REASONED behind a thought."""
    labels, thinking = true_answer(window), rng.random() < REASONED
    turn = {"role": "assistant", "content": canonical(labels), "reasoning_content": reasoning(window, labels) if thinking else ""}
    return Lesson(window.id, [*prompt(home, window), turn], thinking)


def naming(number: int) -> list[Lesson]:
    """A home of P of which the prompt tells nothing but its labels: what it calls each activity, in any order."""
    rng, home = Random(f"drill {number}"), house(f"P{NAMING + number}")
    named = [(activity, label) for activity, label in home.labels.items() if activity != "wake"]
    thought = "\n".join(f"{activity} {label}" for activity, label in rng.sample(named, len(named)))
    question, answer = {"role": "user", "content": "[]"}, {"role": "assistant", "content": "[]", "reasoning_content": thought}
    return [Lesson(home.name, [_labels_alone(home.home), question, answer], True)]


def drill(number: int) -> list[Lesson]:
    """A few events from all over a day, most of them early, in a home of P of which the prompt tells nothing but its labels."""
    rng = Random(f"drill {number}")
    dataset = read(f"simulated:P{DRILLS + number}")
    window = scattered(rng.choice(list(dataset.recordings())), rng)
    asked = lesson(dataset.homes[0], replace(window, events=window.events[: rng.randint(2, 5)]), rng)
    return [asked._replace(messages=[_labels_alone(dataset.homes[0]), *asked.messages[1:]])]


def _labels_alone(home: Home) -> dict[str, str]:
    return {"role": "system", "content": "\n".join(["# Activities", *(f"- {label.name}" for label in home.labels)])}


def lessons(number: int, windows: int, mixed: int = 0) -> list[Lesson]:
    """Windows of home P`number`, drawn from two of its days; the first `mixed` of them, up to two, are scattered events instead."""
    rng = Random(f"lessons {number}")
    dataset = read(f"simulated:P{number}")
    home, days = dataset.homes[0], rng.sample(list(dataset.recordings()), 2)
    found = [window for day in days for window in Dataset(dataset.name, dataset.homes, (day,)).windows() if true_answer(window)]
    drawn = rng.sample(found, min(windows, len(found)))
    drawn[:mixed] = [scattered(day, rng) for day in days[:mixed]]
    return [lesson(home, window, rng) for window in drawn]


def corpus(tokenizer: Tokenizer, homes: Iterable[list[Lesson]]) -> list[TrainingExample]:
    """The examples of several homes: one prefix a home, and the loss on the answers alone."""
    examples = []
    for found in homes:
        rendered = [render_example(tokenizer, lesson.messages, thinking=lesson.thinking) for lesson in found]
        examples += [TrainingExample(rendered[0].prefix, one.ids, one.mask, lesson.about) for one, lesson in zip(rendered, found)]
    return examples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", type=int, default=6000)
    parser.add_argument("--drills", type=int, default=5000)
    parser.add_argument("--homes", type=int, default=1600)
    parser.add_argument("--windows", type=int, default=2, help="of a home")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=0.192, help="times the width of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SIZES)
    args = parser.parse_args(argv)

    tokenizer = make_tokenizer(args.out / "tokenizer")
    some = partial(lessons, windows=args.windows)
    of = {  # each stage's lessons of a home, which homes, and how many others to validate on
        "names": (naming, range(args.names), 60), "drills": (drill, range(args.drills), 60),
        "homes": (some, range(args.homes), 12), "more-homes": (some, range(args.homes, 2 * args.homes), 12),
    }  # fmt: skip

    def examples(stage: str) -> tuple[list[TrainingExample], list[TrainingExample]]:
        """What to learn and what to validate on."""
        made, homes, others = of[stage]
        return corpus(tokenizer, map(made, homes)), corpus(tokenizer, map(made, range(HELD_OUT, HELD_OUT + others)))

    settings = LoopSettings(
        lr=args.lr, epochs=1, batch_tokens=args.batch_tokens, seed=args.seed, weight_decay=0.01, warmup_fraction=0.03,
        eval_every=200, save_every=100,
    )  # fmt: skip
    for name in SIZES:
        if args.only in (None, name):
            pretrain(name, tokenizer.vocab_size, of, examples, settings, args.out)
    return 0


def make_tokenizer(folder: Path) -> Tokenizer:
    """Train, write and load the models' tokenizer."""
    messages = [message for number in range(TOKENIZER_HOMES) for lesson in lessons(number, 2, mixed=1) for message in lesson.messages]
    texts = [message[part] for message in messages for part in ("content", "reasoning_content") if part in message]
    texts += [system_message(marble_home.home(True, True)), LICENCE.read_text(encoding="utf-8")]
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder)
    return load_tokenizer(folder)


def pretrain(
    name: str, vocab_size: int, stages: Iterable[str], examples: Callable[[str], tuple[list[TrainingExample], list[TrainingExample]]],
    settings: LoopSettings, out: Path,
) -> None:  # fmt: skip
    """Train one of SIZES from random weights in stages, each of which begins with what the one before wrote to `out`/NAME-STAGE."""
    config = Qwen3Config(vocab_size, *SIZES[name], head_dim=64, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=8192)
    model = initialise(Qwen3(config), settings.seed)
    settings = replace(settings, lr=settings.lr / config.hidden_size)
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters", file=sys.stderr)
    for stage in stages:
        folder = out / f"{name}-{stage}"
        if not (folder / "config.json").exists():  # written last
            result = train(
                model, dict(model.named_parameters()), *examples(stage), settings, out / f"{folder.name}-run",
                log=partial(log, name, stage),
            )  # fmt: skip
            print(f"{name}, {stage}: {result}", file=sys.stderr)
            save_model(model.to(torch.bfloat16), folder, out / "tokenizer")
            stored = read_json(folder / "config.json")
            write_json(folder / "config.json", {**stored, "torch_dtype": "float32"})  # in which a CPU computes so small a model faster
        model = load_model(folder, "cpu", "float32")


def log(name: str, stage: str, record: Mapping[str, Any]) -> None:
    """Print one record of the loop in twenty, and every validation."""
    if "validation_loss" in record or record["step"] % 20 == 0:
        print(json.dumps({"model": name, "stage": stage, **record}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
