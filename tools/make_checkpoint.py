"""Write a Qwen3-shaped checkpoint with random weights, in Hugging Face's layout: something to run where no Qwen3 can be downloaded.

    python -m tools.make_checkpoint OUT --tokenizer FOLDER [--like 0.6B] [--layers 4]

The default is small enough to be trained on a CPU within minutes; `--like 0.6B` gives the real sizes of Qwen3-0.6B (1.1 GiB).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.model import Qwen3, initialise
from harkd.qwen3.tokenizer import read_tokenizer
from harkd.qwen3.weights import as_dtype, save_model

SIZES = {
    "small": Qwen3Config(151936, 128, 384, 2, 4, 2, 64, tie_word_embeddings=True, dtype="float32"),
    "0.6B": Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True),
    "8B": Qwen3Config(151936, 4096, 12288, 36, 32, 8, 128),
    "32B": Qwen3Config(151936, 5120, 25600, 64, 64, 8, 128),
}


def random_model(config: Qwen3Config, device: str = "cpu", seed: int = 0) -> Qwen3:
    """A model of `config`'s shape with random weights, drawn on the device.

    The maps keep the size of what goes through them (std 1/sqrt(C)); the head's rows are longer, because one of 151,936 tokens can be named
    with confidence, by a frozen head too, only if the logits spread widely enough.
    """
    with torch.device("meta"):
        model = Qwen3(config)
    model = initialise(model.to(as_dtype(config.dtype)).to_empty(device=device), seed, std=config.hidden_size**-0.5)
    with torch.no_grad():
        model.head_weight.mul_(4.0)
    return model


def make_checkpoint(out: Path, tokenizer: Path, config: Qwen3Config, seed: int = 0, device: str = "cpu") -> None:
    """Write such a model's weights, drawn on the device, and the tokenizer's files to `out`."""
    read_tokenizer(tokenizer)
    save_model(random_model(config, device, seed), out, tokenizer)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen3's tokenizer.json")
    parser.add_argument("--like", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, help="cut or extend the depth")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    changes = {"num_hidden_layers": args.layers, "dtype": args.dtype}
    config = replace(SIZES[args.like], **{name: value for name, value in changes.items() if value})
    make_checkpoint(args.out, args.tokenizer, config, args.seed)
    print(f"{args.out}: random weights, {args.like}, {config.num_hidden_layers} layers, {config.dtype}, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
