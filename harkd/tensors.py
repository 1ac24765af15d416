"""safetensors files: read byte range by byte range into place, written whole or not at all.

A file is 8 bytes, the length N of its header (little endian); N bytes of JSON, {name: {dtype, shape, data_offsets: [begin, end]}}; the
bytes of all tensors, without gaps. Source: the format's description in the safetensors repository. The header is checked against the file's
size before anything is read. A tensor's bytes then go straight into a tensor that is there already (through a small buffer where dtype or
device differ): mapping the file into memory would count the weights twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from harkd.errors import UserError
from harkd.files import replacing

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100 << 20  # bytes, the format's own limit
BUFFER = 16 << 20  # bytes read at a time where dtype or device differ


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, or a part of one: file, dtype, shape, first byte, number of bytes, in `runs` that begin `step` bytes apart."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int
    runs: int = 1
    step: int = 0

    def part(self, axis: int, part: int, parts: int) -> Stored:
        """One of `parts` equal parts of a whole tensor along an axis."""
        if parts == 1:
            return self  # in one run, whatever the axis
        shape = tuple(n // parts if i == axis else n for i, n in enumerate(self.shape))
        runs = max(math.prod(self.shape[:axis]), 1)
        step = self.size // runs
        return replace(self, shape=shape, begin=self.begin + part * step // parts, size=self.size // parts, runs=runs, step=step)


@contextmanager
def allocating(what: str) -> Iterator[None]:
    """Raise a UserError that names `what` where torch finds no memory in the block."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"there is no memory for {what}: {str(error).splitlines()[0]}") from None


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises UserError where the file is truncated or its header does not fit its size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{path} is truncated or no safetensors file: {size} bytes, of which the header claims {length + 8}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        stored = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a damaged safetensors header: {error!r}") from None
    end = 8 + length
    for tensor in sorted(stored.values(), key=lambda tensor: (tensor.begin, tensor.size)):
        if tensor.begin != end:
            raise UserError(f"{path} is damaged: its tensors overlap or leave a gap at byte {end}")
        end += tensor.size
    if end != size:
        raise UserError(f"{path} is truncated or damaged: its tensors end at byte {end}, the file at {size}")
    return stored


def _stored(path: Path, entry: dict, data: int) -> Stored:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise UserError(f"{path} stores tensors as {entry['dtype']}; harkd reads {', '.join(_DTYPES)}")
    dtype = _DTYPES[entry["dtype"]]
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fit the bytes {begin} to {end}")
    return Stored(path, dtype, shape, data + begin, end - begin)


def read_into(stored: Stored, target: Tensor) -> None:
    """Fill `target`, contiguous, of the stored shape and of any dtype and device, with a stored tensor's bytes, reading those alone."""
    flat = target.detach().view(-1)
    direct = stored.dtype == target.dtype and target.device.type == "cpu"
    rows = flat.numel() if direct else BUFFER // stored.dtype.itemsize
    # one buffer for all parts: many would stay in the allocator
    piece = flat if direct else torch.empty(min(rows, flat.numel()), dtype=stored.dtype)
    length, done = stored.size // stored.runs, 0  # of a run, of all
    with open(stored.path, "rb", buffering=0) as file:
        for part in flat.split(rows) if flat.numel() else ():
            buffer = piece[: part.numel()]
            view = memoryview(buffer.view(torch.uint8).numpy())
            while view:
                run, at = divmod(done, length)
                file.seek(stored.begin + run * stored.step + at)
                count = file.readinto(view[: length - at])
                if not count:
                    raise UserError(f"{stored.path} ended while it was read")
                view, done = view[count:], done + count
            if not direct:
                part.copy_(buffer)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in place of the one before, which stays whole until then."""
    with replacing(path) as file:
        mode = os.fstat(file.fileno()).st_mode
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, file.name, metadata=dict(metadata or {"format": "pt"}))
        with open(file.name, "rb+") as written:  # the library made a file of its own, readable by its owner alone
            os.fchmod(written.fileno(), mode & 0o777)
            os.fsync(written.fileno())
