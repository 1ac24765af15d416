"""A trained adapter, merged into its base, as a Hugging Face folder for other software."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from harkd.doors import file_digest
from harkd.errors import UserError
from harkd.files import read_json, write_json


def export_merged(model: str, adapter: str, out: Path, dtype: str | None = None) -> str:
    """Merge an adapter into its base, in float32, and write a Hugging Face folder that transformers and vLLM load, whole or not at all.

    `harkd.json` there tells what was merged: the same export a second time finds that it is done. Raises UserError where the folder holds
    anything else.
    """
    from harkd.qwen3.hub import resolve
    from harkd.qwen3.lora import merge
    from harkd.qwen3.weights import load_model, save_model

    merged = {"base": model, "dtype": dtype, "adapter": adapter, "adapter_digest": file_digest(Path(adapter) / "adapter_model.safetensors")}
    if (out / "harkd.json").is_file() and read_json(out / "harkd.json") == merged:
        print(f"{out} is done", file=sys.stderr)
        return str(out)
    check_export(out, Path(adapter))
    partial = _partial(out)
    save_model(merge(load_model(model, "cpu", dtype, adapter)), partial, resolve(model))
    write_json(partial / "harkd.json", merged)
    partial.replace(out.resolve())
    return str(out)


def _partial(out: Path) -> Path:
    """Where an export is written until it is whole."""
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def check_export(export: Path, out: Path) -> None:
    """See that a folder can be written there when training is over."""
    if export.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{export} is the run's own folder or holds it: name another one with --export")
    if export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise UserError(f"{export} is not empty: name another folder with --export")
    try:
        shutil.rmtree(_partial(export), ignore_errors=True)  # of a killed run
        _partial(export).mkdir(parents=True)
        _partial(export).rmdir()
    except OSError as error:
        raise UserError(f"{export} cannot be written: {error.strerror}: name another folder with --export") from None
