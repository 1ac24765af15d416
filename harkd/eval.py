"""Door 3: models and baselines label the same test windows with the same prompts, and are scored against the truth.

    python -m harkd.eval --model Qwen/Qwen3-0.6B --adapter runs/adapter --model baseline:sensor --data marble:PATH --out runs/eval

Each `--model` is a row of the comparison, and so is each `--adapter` on its base. A base that an adapter was trained on is evaluated in the adapter's mode, with or without reasoning,
so that before and after differ in nothing else. `metrics.json` holds scores alone; what depends on the machine is in `cost.json`.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harkd.doors import Parser, RunFolder, add_model_arguments, add_sampling_arguments, checked_device, enter, peak_memory, sampling_of
from harkd.errors import UserError
from harkd.files import write_json
from harkd.homes.answer import NOT_WELL_FORMED
from harkd.homes.dataset import Dataset, ReadOptions, add_data_arguments, read, read_options
from harkd.homes.events import Window
from harkd.jsonl import JsonLinesWriter, read_json_lines
from harkd.recognition import CUT_OFF, first_windows, mode, read_answer, request
from harkd.sampling.sampler import Sampling
from harkd.scoring.baselines import baseline
from harkd.scoring.metrics import Scores, score
from harkd.scoring.table import comparison

if TYPE_CHECKING:
    from harkd.sampling.generator import Generator

BASELINE = "baseline:"


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison: a model in one mode, perhaps with an adapter, or a baseline."""

    name: str
    model: str
    adapter: str | None = None
    thinking: bool = False
    sampling: Sampling | None = None

    @property
    def file(self) -> str:
        return f"predictions-{re.sub(r'[^A-Za-z0-9_.+-]+', '-', self.name)}.jsonl"


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate, on which windows."""

    contestants: tuple[Contestant, ...]
    data: str
    out: str
    split: str = "test"
    rules: bool = True
    limit: int | None = None
    options: ReadOptions = ReadOptions()
    dtype: str | None = None


@dataclass
class _Cost:
    """What a contestant took in this process."""

    parameters: int = 0
    bytes: int = 0
    windows: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        per_window = {f"{name}_per_window": getattr(self, name) / self.windows for name in ("seconds", "prompt_tokens", "completion_tokens") if self.windows}
        return {**asdict(self), **per_window, "peak_memory_bytes": peak_memory()}


def contestants(models: Sequence[str], adapters: Sequence[str], thinking: bool | None) -> list[Contestant]:
    """The rows of the comparison, without their sampling. `thinking` None: as the adapters were trained, with reasoning where there is none.

    Raises UserError for an adapter of another base, prompt, answer form or mode.
    """
    from harkd.qwen3.hub import ADAPTER_FILES, resolve
    from harkd.qwen3.lora import read_notes

    bases = list(dict.fromkeys(model for model in models if not model.startswith(BASELINE)))
    notes = {adapter: read_notes(resolve(adapter, ADAPTER_FILES)) for adapter in adapters}
    for adapter in adapters:
        if len(bases) != 1 and notes[adapter].get("base") not in bases:
            raise UserError(f"the adapter {adapter} was trained on {notes[adapter].get('base', 'an unknown base')}, which is not among --model")
    rows = []
    for model in models:
        if model.startswith(BASELINE):
            baseline(model.removeprefix(BASELINE))
            rows.append(Contestant(model, model))
            continue
        modes = {adapter: mode(adapter, thinking) for adapter in adapters if len(bases) == 1 or notes[adapter]["base"] == model}
        rows += [Contestant("", model, None, with_reasoning) for with_reasoning in dict.fromkeys(modes.values()) or [mode(None, thinking)]]
        rows += [Contestant("", model, adapter, with_reasoning) for adapter, with_reasoning in modes.items()]
    return _named(list(dict.fromkeys(rows)))


def _named(rows: Sequence[Contestant]) -> list[Contestant]:
    """Name every row by the last part of its model's and adapter's names, or by all of them and its place where that gives one file to two rows."""

    def title(row: Contestant, short: bool) -> str:
        if row.model.startswith(BASELINE):
            return row.model
        model, *adapter = (Path(ref).resolve().name if short else ref for ref in (row.model, row.adapter) if ref is not None)
        return f"{model} + {adapter[0]}" if adapter else f"{model} {'with' if row.thinking else 'without'} reasoning"

    rows = [replace(row, name=title(row, short=True)) for row in rows]
    files = Counter(row.file for row in rows)
    return [replace(row, name=f"{title(row, short=False)} #{i}") if files[row.file] > 1 else row for i, row in enumerate(rows, 1)]


def evaluate(settings: EvalSettings, *, device: str | None = None, batch: int = 16, cache_tokens: int = 65536, overwrite: bool = False) -> dict[str, Any]:
    """Let every contestant label every window, continuing what is there, and write metrics.json. Returns {"models": [scores of each]}."""
    from harkd.qwen3.hub import ADAPTER_FILES, resolve

    dataset = read(settings.data, settings.options)
    total = sum(1 for _ in first_windows(dataset, settings.split, settings.limit))
    inputs = [resolve(row.adapter, ADAPTER_FILES) / "adapter_model.safetensors" for row in settings.contestants if row.adapter is not None]
    folder = RunFolder(settings.out, "eval", asdict(settings), overwrite, ("metrics.json", "predictions-*.jsonl"), inputs)
    if folder.result is not None:
        print(comparison(folder.result["models"]))
        return folder.result
    for contestant in settings.contestants:
        if not contestant.model.startswith(BASELINE):
            _check_files(contestant)
    checked_device(device)
    folder.begin()
    costs: dict[str, _Cost] = {}
    for contestant in sorted(settings.contestants, key=lambda row: row.adapter is None):  # adapters first: one that does not fit its base shows at once
        costs[contestant.name] = _predict(contestant, settings, dataset, folder.path / contestant.file, total, device, batch, cache_tokens)
    rows, metrics = [], []
    for contestant in settings.contestants:
        cost = costs[contestant.name]
        scores, counts = _score(folder.path / contestant.file, dataset)
        metrics.append({"name": contestant.name, **counts, **scores.to_dict()})
        figures = {name: getattr(scores, name) for name in ("weighted_f1", "macro_f1", "accuracy", "missing")}
        seconds = cost.seconds / cost.windows if cost.windows else None
        rows.append({"name": contestant.name, **figures, "malformed": counts["malformed"], "parameters": cost.parameters, "seconds_per_window": seconds})
    write_json(folder.path / "metrics.json", {"data": settings.data, "split": settings.split, "models": metrics})
    print(f"{total} windows of {settings.split}, {metrics[0]['events']} events, of which {metrics[0]['scored']} are scored\n\n{comparison(rows)}")
    return folder.finish({"models": rows}, {"models": {name: cost.to_dict() for name, cost in costs.items()}})


def _check_files(contestant: Contestant) -> None:
    """See that a contestant's files are there and whole, before hours go into the others. Raises UserError."""
    from harkd.qwen3.config import read_config
    from harkd.qwen3.hub import ADAPTER_FILES, resolve
    from harkd.qwen3.lora import read_adapter_config
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.qwen3.weights import read_header, stored_tensors

    read_config(resolve(contestant.model))
    stored_tensors(resolve(contestant.model))
    load_tokenizer(contestant.model)
    if contestant.adapter is not None:
        adapter = resolve(contestant.adapter, ADAPTER_FILES)
        read_adapter_config(adapter)
        read_header(adapter / "adapter_model.safetensors")


def _predict(
    contestant: Contestant, settings: EvalSettings, dataset: Dataset, path: Path, total: int, device: str | None, batch: int, cache_tokens: int
) -> _Cost:
    """Write the predictions that `path` lacks."""
    from tqdm import tqdm

    cost = _Cost()
    with JsonLinesWriter(path) as writer:
        done = {record["window"] for _, record in read_json_lines(path)}
        work = (window for window in first_windows(dataset, settings.split, settings.limit) if window.id not in done)
        if contestant.model.startswith(BASELINE):
            answers = _baseline_answers(contestant, dataset, work)
        else:
            answers = _model_answers(contestant, settings, dataset, work, cost, device, batch, cache_tokens)
        start = time.perf_counter()
        with tqdm(total=total, initial=len(done), desc=contestant.name, unit="window", file=sys.stderr) as progress:
            for window, record in answers:
                truth = [list(event.labels) for event in window.events]
                writer.append({"window": window.id, "home": window.home, "group": window.group, "recording": window.recording, "truth": truth, **record})
                cost.windows += 1
                cost.seconds = time.perf_counter() - start
                progress.update()
    return cost


def _baseline_answers(contestant: Contestant, dataset: Dataset, work: Iterator[Window]) -> Iterator[tuple[Window, dict[str, Any]]]:
    """Fit on the training split, whatever split is evaluated."""
    fitted = baseline(contestant.model.removeprefix(BASELINE)).fit(dataset.windows("train"), _labels(dataset))
    for window in work:
        yield window, {"answer": fitted.predict(window), "causes": {}}


def _model_answers(
    contestant: Contestant, settings: EvalSettings, dataset: Dataset, work: Iterator[Window], cost: _Cost, device: str | None, batch: int, cache_tokens: int
) -> Iterator[tuple[Window, dict[str, Any]]]:
    """Load the model, and let it label the windows; its time is that of the answers alone."""
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.qwen3.weights import load_model
    from harkd.sampling.generator import Generator

    model = load_model(contestant.model, checked_device(device), settings.dtype, contestant.adapter)
    parameters = list(model.parameters())
    cost.parameters, cost.bytes = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    generator = Generator(model, load_tokenizer(contestant.model), batch, cache_tokens)
    return _answers(contestant, settings, dataset, work, cost, generator)


def _answers(
    contestant: Contestant, settings: EvalSettings, dataset: Dataset, work: Iterator[Window], cost: _Cost, generator: Generator
) -> Iterator[tuple[Window, dict[str, Any]]]:
    windows: dict[str, Window] = {}

    def requests() -> Iterator[Any]:
        for window in work:
            windows[window.id] = window
            yield request(dataset.home(window.home), window, thinking=contestant.thinking, sampling=contestant.sampling, rules=settings.rules)

    for done in generator.generate(requests()):
        window = windows.pop(done.request.window)
        answer = read_answer(done.text, done.finish_reason, window, dataset.home(window.home).label_names)
        tokens = {"prompt": done.prompt_tokens, "completion": len(done.ids)}
        cost.prompt_tokens += tokens["prompt"]
        cost.completion_tokens += tokens["completion"]
        logprob = sum(done.logprobs) / len(done.logprobs)
        yield (
            window,
            {"answer": answer.labels, "causes": answer.causes, "text": done.text, "finish_reason": done.finish_reason, "tokens": tokens, "mean_logprob": logprob},
        )


def _labels(dataset: Dataset) -> list[str]:
    """The labels on offer in any home, in their order."""
    return list(dict.fromkeys(name for home in dataset.homes for name in home.label_names))


def _score(path: Path, dataset: Dataset) -> tuple[Scores, dict[str, Any]]:
    """Scores of a predictions file; the share of windows whose output was not well formed, and all causes."""
    truth: list[Sequence[str]] = []
    predictions: list[str | None] = []
    causes: Counter[str] = Counter()
    windows = malformed = 0
    for _, record in sorted(read_json_lines(path), key=lambda line: line[1]["window"]):
        windows += 1
        truth += record["truth"]
        predictions += record["answer"]
        causes.update(record["causes"])
        malformed += any(record["causes"].get(cause) for cause in (*NOT_WELL_FORMED, CUT_OFF))
    counts = {"windows": windows, "malformed": malformed / windows, "malformed_windows": malformed, "causes": dict(sorted(causes.items()))}
    return score(truth, predictions, _labels(dataset)), counts


def _parser() -> Parser:
    parser = Parser("harkd.eval", "Models and baselines label test windows and are scored.")
    parser.add_argument("--model", action="append", help="a folder, a hub id, or baseline:majority, baseline:sensor; may be given several times")
    parser.add_argument("--adapter", action="append", default=[], help="a LoRA adapter of one of the models; may be given several times")
    parser.add_argument("--data", help="READER:PATH, for instance marble:PATH")
    parser.add_argument("--split", default="test", help="train, validation, test or all")
    parser.add_argument("--out", help="the run's folder")
    parser.add_switch("--thinking", None, "reason before the answer; as the adapter was trained, else yes")
    parser.add_switch("--rules", True, "put the rules for ambiguous cases into the prompt")
    parser.add_argument("--limit", type=int, help="only the first so many windows")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    args = parser.parse_args(argv)
    parser.demand(args, "model", "data", "out")
    parser.at_least_one(args, "limit", "batch", "cache_tokens")
    rows = contestants(args.model, args.adapter, args.thinking)
    samplings = {thinking: sampling_of(args, thinking) for thinking in {row.thinking for row in rows if not row.model.startswith(BASELINE)}}
    rows = [row if row.model.startswith(BASELINE) else replace(row, sampling=samplings[row.thinking]) for row in rows]
    settings = EvalSettings(tuple(rows), args.data, args.out, args.split, args.rules, args.limit, read_options(args), args.dtype)
    return evaluate(settings, device=args.device, batch=args.batch, cache_tokens=args.cache_tokens, overwrite=args.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("harkd.eval", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
