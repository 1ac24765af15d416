"""From the name of a model or adapter to a folder on this machine: a model that ships with the package, a local folder, or a Hugging Face
hub id that is downloaded once and kept in the hub's cache.

Only this module uses the network. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as in huggingface-hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from harkd.errors import UserError

EMBEDDED = ("nano-teacher", "nano-student")  # in harkd/models/, pretrained by tools/pretrain_nano.py
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json",)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "harkd.json")


def resolve(ref: str | Path, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """The local folder of `ref`, downloading the files that match `patterns` where it is a hub id.

    Raises UserError where there is neither.
    """
    if str(ref) in EMBEDDED:
        return Path(__file__).parents[1] / "models" / ref
    folder = Path(os.path.expanduser(ref))  # leaves ~nobody as it is, where Path.expanduser raises
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{ref} is a file; a model is named by its folder or by a hub id such as Qwen/Qwen3-0.6B")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(ref)):
        raise UserError(f"{ref!r} is neither an existing folder nor a hub id such as Qwen/Qwen3-0.6B, nor {' nor '.join(EMBEDDED)}")
    return _download(str(ref), patterns)


def _download(ref: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(ref, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{ref!r} is no local folder, and the hub did not give it: {reason}") from error
