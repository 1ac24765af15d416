"""Who takes part in an evaluation: models, each in the modes that its adapters use, adapters on their bases, and baselines.

`--model A --model baseline:sensor --adapter X` gives the rows "A with reasoning" or "A without reasoning", as X was trained, "A + X" and
"baseline:sensor".
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harkd.errors import UserError
from harkd.recognition import mode
from harkd.sampling.request import Sampling, recommended
from harkd.scoring.baselines import baseline

BASELINE = "baseline:"


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison: a model in one mode, perhaps with an adapter, or a baseline."""

    name: str
    model: str
    adapter: str | None = None
    thinking: bool = False
    sampling: Sampling | None = None  # None: a baseline

    @property
    def file(self) -> str:
        """The name of its predictions' file: the end of its own name, since file names may be no longer than 255 bytes."""
        return f"predictions-{re.sub(r'[^A-Za-z0-9_.+-]+', '-', self.name)[-200:]}.jsonl"

    @property
    def baseline(self) -> str | None:
        """The baseline's name, None for a model."""
        return self.model.removeprefix(BASELINE) if self.model.startswith(BASELINE) else None


def contestants(
    models: Sequence[str], adapters: Sequence[str], thinking: bool | None, sampling: Callable[[bool], Sampling] = recommended
) -> list[Contestant]:
    """The rows of the comparison, with the sampling of each mode, by default what Qwen3 recommends.

    `thinking` None: as the adapters were trained, with reasoning where there is none. Raises UserError for an adapter of another base,
    prompt, answer form or mode.
    """
    from harkd.qwen3.hub import ADAPTER_FILES, resolve
    from harkd.qwen3.lora import read_notes

    places = {_place(model) for model in models if not model.startswith(BASELINE)}
    bases = {adapter: read_notes(resolve(_place(adapter), ADAPTER_FILES)).get("base", "an unknown base") for adapter in adapters}
    for adapter, base in bases.items():
        if len(places) != 1 and _place(base) not in places:
            raise UserError(f"the adapter {adapter} was trained on {base}, which is not among --model")
    rows = []
    for model in models:
        if model.startswith(BASELINE):
            baseline(model.removeprefix(BASELINE))
            rows.append(Contestant(model, model))
            continue
        modes = {adapter: mode(adapter, thinking) for adapter in adapters if len(places) == 1 or _place(bases[adapter]) == _place(model)}
        rows += [Contestant("", model, None, with_reasoning) for with_reasoning in dict.fromkeys(modes.values()) or [mode(None, thinking)]]
        rows += [Contestant("", model, adapter, with_reasoning) for adapter, with_reasoning in modes.items()]
    of = {thinks: sampling(thinks) for thinks in {row.thinking for row in rows if not row.baseline}}
    return _named([row if row.baseline else replace(row, sampling=of[row.thinking]) for row in dict.fromkeys(rows)])


def _place(ref: str) -> str:
    """A model's folder, however it is spelled; a hub id as it is. UserError for what can be neither."""
    try:
        folder = Path(ref).expanduser()
        return str(folder.resolve()) if folder.is_dir() else ref
    except (RuntimeError, OSError) as error:  # ~nobody, or too long a name
        raise UserError(f"{ref!r} is neither a folder nor a hub id: {getattr(error, 'strerror', None) or error}") from None


def _named(rows: Sequence[Contestant]) -> list[Contestant]:
    """Name every row by the last part of its model's and adapter's names, or by all of them and its place where two rows had one file."""

    def title(row: Contestant, short: bool) -> str:
        if row.baseline:
            return row.model
        model, *adapter = (Path(ref).resolve().name if short else ref for ref in (row.model, row.adapter) if ref is not None)
        return f"{model} + {adapter[0]}" if adapter else f"{model} {'with' if row.thinking else 'without'} reasoning"

    rows = [replace(row, name=title(row, short=True)) for row in rows]
    files = [row.file.casefold() for row in rows]  # some file systems do not tell A from a
    shared = {file for file, count in Counter(files).items() if count > 1}
    pairs = enumerate(zip(rows, files), 1)
    return [replace(row, name=f"{title(row, short=False)} #{i}") if file in shared else row for i, (row, file) in pairs]


def check_files(contestant: Contestant, groups: Collection[str] = ()) -> None:
    """See that a contestant's files are there and whole, before hours go into the others. Raises UserError.

    Warns where its adapter was trained on some of `groups`, the digests of those evaluated.
    """
    from harkd.qwen3.config import read_config
    from harkd.qwen3.hub import ADAPTER_FILES, resolve
    from harkd.qwen3.lora import read_adapter_config, read_notes
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.tensors import read_header

    read_config(resolve(contestant.model))
    load_tokenizer(contestant.model)
    if contestant.adapter is not None:
        adapter = resolve(contestant.adapter, ADAPTER_FILES)
        read_adapter_config(adapter)
        read_header(adapter / "adapter_model.safetensors")
        if known := len(set(groups) & set(read_notes(adapter).get("groups", ()))):
            what = f"the adapter {contestant.adapter} was trained on {known} of the {len(groups)} groups that are evaluated"
            print(f"warning: {what}: its scores there say nothing about new ones", file=sys.stderr)
