"""Weights from a Hugging Face folder into a model, strictly and without a second copy; and a model back into such a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from harkd.distributed import World
from harkd.errors import UserError
from harkd.files import read_json, write_json
from harkd.qwen3.config import DTYPES, Qwen3Config, read_config
from harkd.qwen3.hub import ADAPTER_FILES, resolve
from harkd.qwen3.linear import separate
from harkd.qwen3.lora import load_adapter
from harkd.qwen3.model import Qwen3
from harkd.qwen3.parallel import cut, divided
from harkd.tensors import BUFFER, Stored, allocating, read_header, read_into, write_tensors


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder.

    They lie in `model.safetensors` (first, as in transformers), or in the shards that `model.safetensors.index.json` names.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise UserError(f"{folder} holds no model.safetensors and no model.safetensors.index.json (other weight formats are not read)")
    try:
        names = dict(read_json(index)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error!r}") from None
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names the shard {file!r}, which is no file of its folder")
    files = {file: read_header(folder / file) for file in sorted(set(names.values()))}
    if sum(len(header) for header in files.values()) != len(names) or any(name not in files[file] for name, file in names.items()):
        raise UserError(f"{index} and its shards do not hold the same tensors")
    return {name: files[file][name] for name, file in names.items()}


def fill(model: Qwen3, folder: Path, dtype: torch.dtype, device: torch.device, whole: Qwen3Config | None = None) -> None:
    """Fill a model built on the meta device: each parameter exactly once, no tensor left over, shapes equal.

    `whole` are the sizes of the stored model where this is a part of it. Raises UserError that names the tensor.
    """
    stored = stored_tensors(folder)
    head = stored.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    parameters = dict(model.named_parameters())
    missing, unknown = sorted(parameters.keys() - stored.keys()), sorted(stored.keys() - parameters.keys())
    if missing or unknown:
        extra = f"{stored[unknown[0]].path} holds {unknown[0]}, which the config does not ask for" if unknown else ""
        what = f"{folder} lacks {missing[0]}" if missing else extra
        raise UserError(f"{what} ({len(missing)} tensors missing, {len(unknown)} unknown)")
    for name, parameter in parameters.items():
        axis, part, parts = cut(name, whole or model.config, model.group.rank, model.group.size)
        shape, wanted = list(stored[name].shape), [n * parts if i == axis else n for i, n in enumerate(parameter.shape)]
        if shape != wanted:
            raise UserError(f"{stored[name].path}: {name} has shape {shape}, the config asks for {wanted}")
        stored[name] = stored[name].part(axis, part, parts)
    if head is not None:
        _check_tied_head(head, stored["model.embed_tokens.weight"])
    for name, parameter in parameters.items():
        module = model.get_submodule(name.rpartition(".")[0])
        with allocating(f"the weights of {folder}"):
            filled = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
        read_into(stored[name], filled)
        setattr(module, name.rpartition(".")[2], filled)


def _check_tied_head(head: Stored, embedding: Stored) -> None:
    """Some checkpoints store the tied head a second time: it must be the embedding, byte for byte."""
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    with open(head.path, "rb") as left, open(embedding.path, "rb") as right:
        left.seek(head.begin)
        right.seek(embedding.begin)
        for done in range(0, head.size if same else 0, BUFFER):
            count = min(BUFFER, head.size - done)
            same = same and left.read(count) == right.read(count)
    if not same:
        differs = "lm_head.weight differs from model.embed_tokens.weight"
        raise UserError(f"{head.path}: the config ties the head to the embedding, but {differs}")


def load_model(
    ref: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None, adapter: str | Path | None = None,
    group: World | None = None,
) -> Qwen3:  # fmt: skip
    """Read a Qwen3 from a local folder or a hub id.

    Args:
        ref: a folder in Hugging Face's layout, or a hub id such as "Qwen/Qwen3-0.6B".
        device: "cpu", "cuda", ...; by default CUDA where there is a GPU.
        dtype: "bfloat16", "float16", "float32" or "float64", or a torch dtype; by default the stored one.
        adapter: a LoRA adapter in PEFT's layout, to be added unmerged.
        group: the processes of which each is to hold a part of the model (qwen3/parallel.py), which takes no adapter then.
    Returns the model, in evaluation mode; its `logits(ids)` maps [T] to [T, V] in float32. Raises UserError that says what is wrong with
    the files or the device.
    """
    device, group = as_device(device), group or World()  # first: before a download
    if adapter is not None and group.size > 1:
        raise UserError(f"a model that {group.size} processes share takes no adapter: merge it with harkd.train --export, and name that")
    folder = resolve(ref)
    config = read_config(folder)
    with torch.device("meta"):
        model = Qwen3(divided(config, group.size), group)
    fill(model, folder, as_dtype(dtype or config.dtype), device, config)
    if adapter is not None:
        load_adapter(model, resolve(adapter, ADAPTER_FILES))
    return model.eval()


def model_size(ref: str | Path, dtype: torch.dtype | str | None = None) -> dict[str, int]:
    """How many parameters a model has, and the bytes that they take, without reading them."""
    config = read_config(resolve(ref))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen3(config).parameters())
    return {"parameters": parameters, "bytes": parameters * as_dtype(dtype or config.dtype).itemsize}


def as_device(name: str | torch.device | None = None) -> torch.device:
    """The torch device of a name such as "cuda:1", by default CUDA where there is a GPU. Raises UserError where it cannot be used."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name is None else torch.device(name)
        torch.empty(1, device=device).tolist()  # which "meta" cannot do either
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16". Raises UserError for any other name."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def save_model(model: Qwen3, folder: Path, source: Path | None = None, shard_bytes: int = 4 << 30) -> None:
    """Write a model as a Hugging Face folder: config.json, safetensors (sharded above `shard_bytes`) and, from `source`, the tokenizer's
    files.

    A tied head is written once, as the embedding; maps that were joined are separate from then on. The folder appears whole: files first,
    config.json last.
    """
    separate(model)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, parameter in model.named_parameters():
        used = sum(tensor.nbytes for tensor in shards[-1].values())
        if shards[-1] and used + parameter.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = parameter
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard)
    (folder / ("model.safetensors" if count > 1 else "model.safetensors.index.json")).unlink(missing_ok=True)  # of an earlier model
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(parameter.nbytes for parameter in model.parameters())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if source is not None and (source / file).exists():
            shutil.copyfile(source / file, folder / file)
    write_json(folder / "config.json", {**model.config.to_dict(), "torch_dtype": str(model.dtype).removeprefix("torch.")})
