"""Checkpoints that are whole or absent: one safetensors file each, written under another name, flushed and renamed.

    tensors    parameter/NAME, and of "last" the optimiser's mean/NAME, square/NAME, master/NAME, steps
    metadata   {"harkd": JSON of the facts (step, epoch, best validation loss, run, torch version),
                "crc32": JSON of a checksum per tensor and one of the facts}

Of "last" the one before is kept as "previous", and used where "last" is damaged. Tensors and facts are one file, so no kill can separate
them. There is no state of random generators because there are no generators: the order of examples is a function of (seed, epoch), what the
student writes on-policy one of (seed, step), and nothing else in training is random, so the step alone is the cursor.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harkd.distill.optimiser import AdamW
from harkd.errors import UserError
from harkd.tensors import write_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its file, its tensors and its facts."""

    path: Path
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def restore(self, parameters: Mapping[str, nn.Parameter], optimiser: AdamW | None = None) -> None:
        """Copy the parameters, and the optimiser's state, into place. UserError where they belong to another model."""
        state = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("parameter/")}
        try:
            stored = {name: self.tensors[f"parameter/{name}"] for name in parameters}
            if len(stored) + len(state) != len(self.tensors) or any(stored[n].shape != p.shape for n, p in parameters.items()):
                raise ValueError("other parameters")
            if optimiser is not None:
                optimiser.load_state_dict(state)
        except (KeyError, ValueError) as error:
            raise UserError(f"the checkpoint {self.path} belongs to another model: train into another folder ({error})") from None
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])


def save(folder: Path, name: str, parameters: Mapping[str, nn.Parameter], optimiser: AdamW | None, facts: Mapping[str, Any]) -> Path:
    """Write `folder`/NAME.safetensors in place of the one before, which stays whole until then; of "last" it becomes "previous"."""
    tensors = {f"parameter/{key}": parameter for key, parameter in parameters.items()} | (optimiser.state_dict() if optimiser else {})
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    text = json.dumps(dict(facts))
    path = folder / f"{name}.safetensors"
    following = path.with_name(f".{path.name}.tmp")
    write_tensors(following, tensors, {"harkd": text, "crc32": json.dumps(_checksums(tensors, text))})
    if name == "last" and path.exists():
        os.replace(path, folder / "previous.safetensors")
    os.replace(following, path)  # a kill right before leaves "previous" alone, which is as good
    return path


def load_last(folder: Path) -> Checkpoint | None:
    """The last checkpoint, or the one before it where that is damaged, which stderr is told, or missing; None if there is neither."""
    try:
        return load(folder, "last") or load(folder, "previous")
    except UserError as error:
        previous = load(folder, "previous")
        if previous is None:
            raise UserError(f"{error}: remove it to train from the start") from None
        print(f"{error}; going on from {previous.path}", file=sys.stderr)
        return previous


def load(folder: Path, name: str) -> Checkpoint | None:
    """Read `folder`/NAME.safetensors, None if there is none. Raises UserError naming the file where it is damaged."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
            metadata = file.metadata() or {}
        facts, checksums = json.loads(metadata["harkd"]), json.loads(metadata["crc32"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error})") from None
    if checksums != _checksums(tensors, metadata["harkd"]):
        raise UserError(f"the checkpoint {path} is damaged (its bytes changed)")
    return Checkpoint(path, tensors, facts)


def _checksums(tensors: Mapping[str, Tensor], facts: str) -> dict[str, int]:
    """CRC-32 of the facts, and of every tensor's bytes behind its type and shape."""
    checksums = {"facts": zlib.crc32(facts.encode())}
    for key, tensor in tensors.items():
        kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        checksums[key] = zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), kind)
    return checksums
