"""Pretrain nano-teacher and nano-student on simulated homes: the same recipe, corpus and number of tokens, and only the size differs.

    python -m tools.pretrain_nano runs/nano             (three hours on two cores; the same command goes on where it was stopped)

1. A byte-level BPE tokenizer with Qwen3's split and special tokens, from the prompts and answers of the first homes of family P, which
   have few words, and from MARBLE's prompt and the text of the licence, so that other homes' words do not fall to pieces.
2. Names: prompts that tell nothing but what --names homes of P call their activities; the thought says it of each, in an order of chance,
   which is not learnt. It is here that a model learns to look a name up in a list, which it hardly learns from events.
3. Parts: --parts other homes, of whose prompts every part but the activities is there by chance; names once more, and a few events from
   all over a day. So the look-up learns to pass over everything else.
4. Homes: whole prompts of --homes others: names, events from all over a day, and --windows windows as they are. Answers are true, most
   of them behind a thought made from the truth, and alone in the loss.
5. Words: the same of --words homes more, and what twice as many others call their activities, in any words (half of them told of in
   part): so that a model can copy the words of homes that are not simulated. It comes last, for it delays all else where it comes first.
6. Two Qwen3 models, trained from random weights by the package's own packing, optimiser and loop, on each home once. The learning rate at
   its peak is --lr over the model's width.

After each stage a model is written as a Hugging Face folder, its tensors in bfloat16, with which the next one begins; the last one ships.
`tools/results/` keeps the log. No home of families D and T is ever seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
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
from harkd.homes.events import Home, Label, Recording, Window
from harkd.homes.prompt import joined, sections, system_message, user_message
from harkd.homes.readers import marble_home
from harkd.homes.simulated import House, house, reasoning, recordings
from harkd.homes.simulated_world import MOTION_NAMES, first_word, plain
from harkd.homes.windows import windows
from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.model import Qwen3, initialise
from harkd.qwen3.tokenizer import Example, Tokenizer, load_tokenizer, render_example
from harkd.qwen3.weights import load_model, save_model

# Qwen3's split into words: contractions, words, single digits, punctuation, line ends, blanks
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")  # ordinary added tokens in Qwen3: skipping special tokens keeps them
VOCABULARY = 2048
SIZES = {  # hidden, intermediate, layers, heads, key/value heads
    "nano-teacher": (192, 512, 4, 2, 2),
    "nano-student": (24, 64, 2, 2, 2),
}
TOKENIZER_HOMES, HELD_OUT, NAMES, PARTS, WORDS = 300, 10**6, 10**7, 2 * 10**7, 3 * 10**7  # how many, and the first number of the others
LETTERS = (  # of Europe; India; Thailand; Vietnam; arrows; Japan; China and Korea; pictures
    (0xA1, 0x52F), (0x905, 0x939), (0xE01, 0xE2E), (0x1E00, 0x1EFF), (0x2190, 0x21FF), (0x3041, 0x30FF), (0x4E00, 0xD7A3),
    (0x1F300, 0x1F64F),
)  # fmt: skip
DAYS = range(1, 29)  # of a home, from which days are drawn
TOLD = 0.25  # chance of a part of a prompt to be told, where not all are
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
    """A conversation about a home that ends with the true answer, with reasoning or without."""

    about: str
    messages: list[dict[str, str]]
    thinking: bool
    by_chance: bool = False  # whether the lines of the thought come in an order that nothing tells


def system_part(home: Home, rng: Random, share: float) -> str:
    """A home's system message, of which everything but the names of its activities is left out with probability 1 - `share`."""
    if rng.random() >= share:
        home = replace(home, labels=tuple(Label(label.name) for label in home.labels))
    return joined(part for part in sections(home) if part[0] == "Activities" or rng.random() < share)


def lesson(drawn: House, system: str, window: Window, rng: Random) -> Lesson:
    """A window behind that system message, and its true answer, in a share REASONED behind a thought."""
    labels, thinking = true_answer(window), rng.random() < REASONED
    turn = {"role": "assistant", "content": canonical(labels), "reasoning_content": reasoning(drawn, window, labels) if thinking else ""}
    return Lesson(window.id, [{"role": "system", "content": system}, {"role": "user", "content": user_message(window)}, turn], thinking)


def naming(home: Home, system: str, rng: Random) -> Lesson:
    """What a home calls each of its activities, in any order."""
    named = home.label_names
    thought = "\n".join(f"{plain(label)} {label}" for label in rng.sample(named, len(named)))
    question, answer = {"role": "user", "content": "[]"}, {"role": "assistant", "content": "[]", "reasoning_content": thought}
    return Lesson(home.name, [{"role": "system", "content": system}, question, answer], True, by_chance=True)


def names(number: int) -> list[Lesson]:
    """The names of a home of P, and nothing else of it."""
    drawn, rng = house(f"P{NAMES + number}"), Random(f"names {number}")
    return [naming(drawn.home, system_part(drawn.home, rng, 0), rng)]


def words(number: int, known: Sequence[str]) -> list[Lesson]:
    """The names of another home, with one or two words of any kind behind the first of each. So a model learns to copy what it never saw,
    and the embedding of every word: those of tokens that no text holds move alike, until bfloat16 knows no difference."""
    drawn, rng = house(f"P{WORDS + number}"), Random(f"words {number}")
    blank, named = rng.choice(" _"), {}
    for label in drawn.home.label_names:
        letters = chr(rng.randint(*rng.choice(LETTERS)))
        more = (letters if rng.random() < 0.1 else "".join(rng.choices(known, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 2)))
        named[label] = blank.join([first_word(label), *more])
    labels = tuple(Label(named[label.name], label.description) for label in drawn.home.labels)
    example = tuple(replace(event, labels=tuple(named[label] for label in event.labels)) for event in drawn.home.example)
    home = replace(drawn.home, labels=labels, example=example)
    return [naming(home, system_part(home, rng, rng.choice((0, TOLD))), rng)]


def known_words(tokenizer: Tokenizer) -> list[str]:
    """What the tokens say, but for blanks, special tokens and parts of letters."""
    told = {tokenizer.decode([id]).strip() for id in range(tokenizer.vocab_size)}
    return sorted(word for word in told if word and word.isprintable() and not set("<\ufffd") & set(word))


def parts(number: int) -> list[Lesson]:
    """A home of P told of in part: its names, and two to six events from all over a day."""
    drawn, rng = house(f"P{PARTS + number}"), Random(f"parts {number}")
    system, window = system_part(drawn.home, rng, TOLD), scattered(rng.choice(recordings(drawn, DAYS)), rng)
    few = replace(window, events=window.events[: rng.randint(2, 6)])
    return [naming(drawn.home, system, rng), lesson(drawn, system, few, rng)]


def homes(number: int, count: int) -> list[Lesson]:
    """Home P`number` told of in whole: its names, events from all over a day, and `count` windows of another day."""
    drawn, rng = house(f"P{number}"), Random(f"homes {number}")
    system, (one, other) = system_message(drawn.home), rng.sample(recordings(drawn, DAYS), 2)
    found = [window for window in windows(other) if true_answer(window)]
    asked = [scattered(one, rng), *rng.sample(found, min(count, len(found)))]
    return [naming(drawn.home, system, rng), *(lesson(drawn, system, window, rng) for window in asked)]


def corpus(tokenizer: Tokenizer, homes: Iterable[list[Lesson]]) -> list[TrainingExample]:
    """The examples of several homes: one prefix a home, and the loss on the answers alone."""
    examples = []
    for found in homes:
        rendered = [render_example(tokenizer, lesson.messages, thinking=lesson.thinking) for lesson in found]
        masks = [without_order(tokenizer, one) if lesson.by_chance else one.mask for one, lesson in zip(rendered, found)]
        examples += [TrainingExample(rendered[0].prefix, one.ids, mask, lesson.about) for one, mask, lesson in zip(rendered, masks, found)]
    return examples


def without_order(tokenizer: Tokenizer, example: Example) -> list[bool]:
    """The mask of a naming, less the words that begin its lines: what has no reason cannot be learnt, and drowns what has."""
    mask, begins = [], False  # whether a token is of a line's first word
    for id, counts in zip(example.ids, example.mask):
        text = tokenizer.decode([id])
        begins = begins and text[0] not in " <"
        mask.append(counts and not begins)
        begins = begins or text.endswith("\n")
    return mask


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", type=int, default=3000)
    parser.add_argument("--parts", type=int, default=4000)
    parser.add_argument("--homes", type=int, default=7000)
    parser.add_argument("--words", type=int, default=3000)
    parser.add_argument("--windows", type=int, default=3, help="of a home, beside one of events from all over a day")
    parser.add_argument("--lr", type=float, default=0.192, help="times the width of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SIZES)
    args = parser.parse_args(argv)

    tokenizer = make_tokenizer(args.out / "tokenizer")
    whole, any_words = partial(homes, count=args.windows), partial(words, known=known_words(tokenizer))
    of = {  # each stage: the lessons of a home, which homes, how many others to validate on, tokens in a pack
        "names": (names, range(args.names), 60, 1024),
        "parts": (parts, range(args.parts), 60, 1536),
        "homes": (whole, range(args.homes), 20, 3584),
        "words": (whole, range(args.homes, args.homes + args.words), 20, 3584),
    }

    def examples(stage: str) -> tuple[list[TrainingExample], list[TrainingExample], int]:
        """What to learn, what to validate on, and how many tokens are in a pack."""
        made, numbers, others, batch_tokens = of[stage]
        lessons = chain(map(made, numbers), map(any_words, range(2 * args.words if stage == "words" else 0)))
        return corpus(tokenizer, lessons), corpus(tokenizer, map(made, range(HELD_OUT, HELD_OUT + others))), batch_tokens

    settings = LoopSettings(
        lr=args.lr, epochs=1, seed=args.seed, weight_decay=0.01, beta2=0.95, warmup_fraction=0.03, eval_every=200, save_every=100
    )
    for name in SIZES:
        if args.only in (None, name):
            pretrain(name, tokenizer.vocab_size, of, examples, settings, args.out)
    return 0


def make_tokenizer(folder: Path) -> Tokenizer:
    """Train, write and load the models' tokenizer, which is there already where the command goes on."""
    if (folder / "tokenizer_config.json").exists():  # written last
        return load_tokenizer(folder)
    messages = [message for number in range(TOKENIZER_HOMES) for lesson in homes(number, 1)[1:] for message in lesson.messages]
    texts = [message[part] for message in messages for part in ("content", "reasoning_content") if part in message]
    texts += [system_message(marble_home.home(True, True)), LICENCE.read_text(encoding="utf-8")]
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder)
    return load_tokenizer(folder)


def pretrain(
    name: str, vocab_size: int, stages: Iterable[str], examples: Callable[[str], tuple[list[TrainingExample], list[TrainingExample], int]],
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
            *lessons, batch_tokens = examples(stage)
            result = train(
                model, dict(model.named_parameters()), *lessons, replace(settings, batch_tokens=batch_tokens), out / f"{folder.name}-run",
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
