"""Pretrain nano-teacher and nano-student on simulated homes: the same recipe, corpus and number of tokens, and only the size differs.

    python -m tools.pretrain_nano runs/nano            (a round takes 75 minutes on one core; the same command goes on where it was stopped)

1. A byte-level BPE tokenizer with Qwen3's split and special tokens, from the prompts and answers of the first homes of family P, which
   have few words, and from MARBLE's prompt and the text of the licence, so that other homes' words do not fall to pieces.
2. The corpus: --homes homes of P, --windows windows of each, with their true answers behind a short thought made from the truth or, one
   time in four, alone. Half of the windows are events from all over a day, each of which belongs to another activity than the one
   before: it is there that a model learns to look labels up in the list of the home.
3. Two Qwen3 models, trained from random weights by the package's own packing, optimiser and loop, each home once, in --rounds over as many
   homes each. The learning rate at its peak is --lr over the model's width, in round n the n-th part of that.

After each round a model is written as a Hugging Face folder, its tensors in bfloat16, with which the next one begins; the last one ships.
`tools/results/` keeps the log. No home of families D and T is ever seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from harkd.distill.examples import TrainingExample, true_answer
from harkd.distill.loop import LoopSettings, train
from harkd.files import read_json, write_json
from harkd.homes.answer import canonical, label_spans
from harkd.homes.dataset import Dataset, read
from harkd.homes.events import Home, Recording, Window
from harkd.homes.prompt import prompt, system_message
from harkd.homes.readers import marble_home
from harkd.homes.simulated import reasoning
from harkd.homes.simulated_world import MOTION_NAMES
from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.model import Qwen3, initialise
from harkd.qwen3.tokenizer import load_tokenizer, render_example
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
TOKENIZER_HOMES = 300
LICENCE = Path(__file__).parents[1] / "LICENSE"


def train_tokenizer(texts: Iterator[str] | list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer as Qwen3's, of `vocab_size` tokens with the special ones."""
    tokenizer = Tokenizer(models.BPE())
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as a Qwen3 folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {id: token.__getstate__() for id, token in tokenizer.get_added_tokens_decoder().items()}
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None,
        "add_prefix_space": False, "model_max_length": 4096, "added_tokens_decoder": added,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)


def scattered(day: Recording, name: str, rng: Random) -> Window:
    """Ten events from all over a day, in their order, that tell by themselves what they belong to."""
    telling = [event for event in day.events() if event.labels and event.sensor not in MOTION_NAMES]
    chosen = sorted(rng.sample(range(len(telling)), min(10, len(telling))))
    return Window(f"{day.home.name}/{day.id}/{name}", day.home.name, day.group, day.id, tuple(telling[i] for i in chosen))


def lessons(number: int, windows: int) -> Iterator[tuple[Home, Window, list[dict[str, str]], bool]]:
    """(home, window, messages with the true answer, with reasoning?) of windows drawn from home P`number`, half of them scattered ones."""
    rng = Random(f"lessons {number}")
    dataset = read(f"simulated:P{number}")
    days = rng.sample(list(dataset.recordings()), 2)
    found = [window for day in days for window in Dataset(dataset.name, dataset.homes, (day,)).windows() if true_answer(window)]
    drawn = rng.sample(found, min(windows, len(found)))
    drawn[::2] = [scattered(days[i % len(days)], f"scattered{i}", rng) for i in range(len(drawn[::2]))]
    for window in drawn:
        labels, thinking = true_answer(window), rng.random() < 0.75
        turn = {"role": "assistant", "content": canonical(labels), "reasoning_content": reasoning(window, labels) if thinking else ""}
        yield dataset.homes[0], window, [*prompt(dataset.homes[0], window), turn], thinking


def corpus(tokenizer, homes: range, windows: int) -> list[TrainingExample]:
    """The examples of several homes.

    The words of the events are learnt too, since they repeat the home's: it is there that a small model learns to copy. Masked from the
    loss are their times, which nothing foretells, and labels of events without a true one.
    """
    examples = []
    for number in homes:
        prefix: list[int] | None = None
        for _, window, messages, thinking in lessons(number, windows):
            spans = label_spans(true_answer(window))
            unscored = [span for span, event in zip(spans, window.events, strict=True) if not event.labels]
            example = render_example(tokenizer, messages, thinking=thinking, unscored=unscored)
            prefix = prefix or example.prefix
            events = example.mask.index(True)
            words = [any(map(str.isalpha, tokenizer.decode([id]))) for id in example.ids[1:events]]
            mask = [False, *words, *example.mask[events:]]  # the prefix foretells no token of its own
            examples.append(TrainingExample(prefix, example.ids, mask, window.id))
    return examples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--homes", type=int, default=4500, help="of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=2, help="of a home")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--packs-per-step", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.096, help="times the width of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SIZES)
    args = parser.parse_args(argv)

    texts = [message["content"] for number in range(TOKENIZER_HOMES) for lesson in lessons(number, 2) for message in lesson[2]]
    texts += [lesson[2][-1]["reasoning_content"] for number in range(TOKENIZER_HOMES) for lesson in lessons(number, 2)]
    texts += [system_message(marble_home.home(True, True)), LICENCE.read_text(encoding="utf-8")]
    base = args.out / "tokenizer"
    save_tokenizer(train_tokenizer(texts, VOCABULARY), base)
    tokenizer = load_tokenizer(base)
    of_round = lambda n: corpus(tokenizer, range(n * args.homes, (n + 1) * args.homes), args.windows)  # noqa: E731
    held_out = corpus(tokenizer, range(10**6, 10**6 + 12), args.windows)
    settings = LoopSettings(
        lr=args.lr, epochs=1, batch_tokens=args.batch_tokens, packs_per_step=args.packs_per_step, seed=args.seed, weight_decay=0.01,
        warmup_fraction=0.03, eval_every=200, save_every=100,
    )  # fmt: skip
    for name in SIZES:
        if args.only in (None, name):
            pretrain(name, tokenizer.vocab_size, args.rounds, of_round, held_out, settings, args.out)
    return 0


def pretrain(
    name: str, vocab_size: int, rounds: int, of_round: Callable[[int], list[TrainingExample]], held_out: list[TrainingExample],
    settings: LoopSettings, out: Path,
) -> None:  # fmt: skip
    """Train one of SIZES from random weights; each round begins with what the one before wrote to `out`/NAME-ROUND."""
    config = Qwen3Config(vocab_size, *SIZES[name], head_dim=64, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=8192)
    model = initialise(Qwen3(config), settings.seed)
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters", file=sys.stderr)
    for number in range(rounds):
        folder = out / f"{name}-{number}"
        if not (folder / "config.json").exists():  # written last
            log = lambda record: print(json.dumps({"model": name, "round": number, **record}), flush=True)  # noqa: B023, E731
            how = replace(settings, lr=settings.lr / config.hidden_size / (1 + number))
            result = train(model, dict(model.named_parameters()), of_round(number), held_out, how, out / f"{name}-{number}-run", log=log)
            print(f"{name}, round {number}: {result}", file=sys.stderr)
            save_model(model.to(torch.bfloat16), folder, out / "tokenizer")
            stored = read_json(folder / "config.json")
            write_json(folder / "config.json", {**stored, "torch_dtype": "float32"})  # in which a CPU computes so small a model faster
        model = load_model(folder, "cpu", "float32")


if __name__ == "__main__":
    sys.exit(main())
