"""Door 3: models and baselines label the same test windows with the same prompts, and are scored against the truth.

    python -m harkd.eval --model Qwen/Qwen3-0.6B --adapter runs/adapter --model baseline:sensor --data marble:PATH --out runs/eval

Each `--model` is a row of the comparison, and so is each `--adapter` on its base. A base that an adapter was trained on is evaluated in the
adapter's mode, with or without reasoning, so that before and after differ in nothing else. Baselines are fitted on the training split
without noise, whatever is evaluated. `metrics.json` holds scores alone, with 95% intervals and every row's difference from the first;
what depends on the machine is in `cost.json`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harkd.contestants import Contestant, check_files, contestants
from harkd.doors import (
    Parser, RunFolder, add_model_arguments, add_sampling_arguments, digests, enter, guiding_of, machine_of, peak_memory, reset_peak_memory,
    sampling_of,
)  # fmt: skip
from harkd.files import write_json
from harkd.homes.answer import Answer
from harkd.homes.dataset import Dataset, ReadOptions, add_data_arguments, read, read_options
from harkd.homes.events import Window
from harkd.jsonl import JsonLinesWriter, read_json_lines
from harkd.recognition import Guiding, Machine, check_fit, completions, first_windows, load_generator, probabilities, read_answer, request
from harkd.sampling.request import Request
from harkd.scoring.baselines import BASELINES, baseline
from harkd.scoring.baselines import answers as baseline_answers
from harkd.scoring.intervals import intervals, paired_differences
from harkd.scoring.metrics import FIGURES, Scores, score
from harkd.scoring.table import comparison

if TYPE_CHECKING:
    from torch import Tensor

    from harkd.sampling.generator import Completion


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
    guiding: Guiding = Guiding()


def evaluate(settings: EvalSettings, *, machine: Machine = Machine(), overwrite: bool = False) -> dict[str, Any]:
    """Let every contestant label every window, continuing what is there, and write metrics.json. Returns {"models": [scores of each]}."""
    from harkd.qwen3.weights import as_device

    dataset = read(settings.data, settings.options)
    total = sum(1 for _ in _windows(settings, dataset))
    models = [row for row in settings.contestants if not row.baseline]
    inputs = digests((row.model for row in models), (row.adapter for row in models))
    folder = RunFolder(settings.out, "eval", asdict(settings), overwrite, ("metrics.json", "predictions-*.jsonl"), inputs)
    if folder.result is not None:
        print(comparison(folder.result["models"]))
        return folder.result
    for contestant in models:
        check_files(contestant)
        asked = _asked(contestant, settings, dataset, _windows(settings, dataset))
        check_fit(contestant.model, (one for _, one in asked), machine)
    as_device(machine.device)
    folder.begin()
    costs: dict[str, dict[str, Any]] = {}
    # baselines, then adapters: faults of the training files, and an adapter that does not fit its base, show before hours go into the rest
    for contestant in sorted(settings.contestants, key=lambda row: (not row.baseline, row.adapter is None)):
        reset_peak_memory()
        sizes = _predict(contestant, settings, dataset, folder.path / contestant.file, total, machine)
        costs[contestant.name] = {**sizes, **_costs(folder.path / contestant.file), "peak_memory_bytes": peak_memory()}
    rows, metrics, first = [], [], None
    lost = list(_lost(dataset, settings))
    for contestant in settings.contestants:
        cost = costs[contestant.name]
        scores, counts, confusions = _score(folder.path / contestant.file, dataset, lost)
        spread = {"intervals": intervals(confusions), "against_first": None if first is None else paired_differences(confusions, first)}
        first = confusions if first is None else first
        metrics.append({"name": contestant.name, **counts, **scores.to_dict(), **spread})
        figures = {name: getattr(scores, name) for name in (*FIGURES, "missing")}
        figures["weighted_f1_interval"] = spread["intervals"] and spread["intervals"]["weighted_f1"]
        figures |= {"malformed": counts["malformed"], "parameters": cost["parameters"], "seconds_per_window": cost["seconds_per_window"]}
        rows.append({"name": contestant.name, **figures})
    write_json(folder.path / "metrics.json", {"data": settings.data, "split": settings.split, "models": metrics})
    events, scored = metrics[0]["events"], metrics[0]["scored"]
    print(f"{total} windows of {settings.split}, {events} events, of which {scored} are scored\n\n{comparison(rows)}")
    peaks = [cost["peak_memory_bytes"] for cost in costs.values()]
    peak = {name: max(found.get(name, 0) for found in peaks) for name in peaks[-1]}
    return folder.finish({"models": rows}, {"peak_memory_bytes": peak, "models": costs})


def _windows(settings: EvalSettings, dataset: Dataset, done: Set[str] = frozenset()) -> Iterator[Window]:
    return (window for window in first_windows(dataset, settings.split, settings.limit) if window.id not in done)


def _asked(contestant: Contestant, settings: EvalSettings, dataset: Dataset, work: Iterable[Window]) -> Iterator[tuple[Window, Request]]:
    """Each window with what a model is asked about it."""
    how = {"thinking": contestant.thinking, "sampling": contestant.sampling, "rules": settings.rules, "guiding": settings.guiding}
    return ((window, request(dataset.home(window.home), window, **how)) for window in work)


def _predict(
    contestant: Contestant, settings: EvalSettings, dataset: Dataset, path: Path, total: int, machine: Machine
) -> dict[str, int]:
    """Write the predictions that `path` lacks, each with the seconds since the one before. Returns parameters and bytes of the model."""
    from tqdm import tqdm

    with JsonLinesWriter(path) as writer:
        done = {record["window"] for _, record in read_json_lines(path)}
        work = _windows(settings, dataset, done)
        parameters: list[Tensor] = []
        if contestant.baseline:
            windows = first_windows(dataset, settings.split, settings.limit)  # all of them: one baseline reads whole recordings
            answers = (pair for pair in _baseline_answers(contestant, dataset, windows) if pair[0].id not in done)
        else:
            generator = load_generator(contestant.model, contestant.adapter, settings.dtype, machine)
            parameters += generator.model.parameters()
            answers = _model_answers(dataset, completions(generator, _asked(contestant, settings, dataset, work)))
        last = time.perf_counter()
        with tqdm(total=total, initial=len(done), desc=contestant.name, unit="window", file=sys.stderr) as progress:
            for window, record in answers:
                truth = [list(event.labels) for event in window.events]
                where = {"window": window.id, "home": window.home, "group": window.group, "recording": window.recording}
                last, before = time.perf_counter(), last
                writer.append({**where, "truth": truth, **record, "seconds": round(last - before, 6)})
                progress.update()
    return {"parameters": sum(p.numel() for p in parameters), "bytes": sum(p.nbytes for p in parameters)}


def _baseline_answers(contestant: Contestant, dataset: Dataset, windows: Iterator[Window]) -> Iterator[tuple[Window, dict[str, Any]]]:
    """Fit on the training split without noise, whatever is evaluated."""
    clean = replace(dataset, options=replace(dataset.options, noise=""))
    fitted = baseline(contestant.baseline).fit(clean.windows("train"), _labels(dataset))
    for window, labels in baseline_answers(fitted, windows):
        yield window, {"answer": labels, "causes": {}}


def _model_answers(dataset: Dataset, written: Iterable[tuple[Window, Completion]]) -> Iterator[tuple[Window, dict[str, Any]]]:
    for window, done in written:
        labels = dataset.home(window.home).label_names
        answer = read_answer(done.text, done.finish_reason, window, labels)
        guided = {"guided": True, "probabilities": probabilities(done, labels)} if done.request.answer else {}
        yield window, {
            "answer": answer.labels, "causes": answer.causes, "text": done.text, "finish_reason": done.finish_reason,
            "tokens": {"prompt": done.prompt_tokens, "completion": len(done.ids)},
            "mean_logprob": sum(done.logprobs) / len(done.logprobs), **guided,
        }  # fmt: skip


def _costs(path: Path) -> dict[str, Any]:
    """What all predictions of a file took, those of a run that was killed too, in all and per window."""
    sums = {"seconds": 0.0, "prompt_tokens": 0, "completion_tokens": 0}
    windows = 0
    for windows, record in read_json_lines(path):
        tokens = record.get("tokens", {})  # a baseline has none
        sums["seconds"] += record["seconds"]
        sums["prompt_tokens"] += tokens.get("prompt", 0)
        sums["completion_tokens"] += tokens.get("completion", 0)
    return {"windows": windows, **sums, **{f"{name}_per_window": value / windows for name, value in sums.items()}}


def _labels(dataset: Dataset) -> list[str]:
    """The labels on offer in any home, in their order."""
    return list(dict.fromkeys(name for home in dataset.homes for name in home.label_names))


def _lost(dataset: Dataset, settings: EvalSettings) -> Iterator[tuple[str, Sequence[str]]]:
    """Group and true labels of the events that noise took from the evaluated stretch of each recording."""
    ends: dict[tuple[str, str], int] = {}
    for window in first_windows(dataset, settings.split, settings.limit) if settings.options.noise else ():
        ends[window.home, window.recording] = max(event.id for event in window.events)
    for recording, event in dataset.lost(settings.split) if settings.options.noise else ():
        if settings.limit is None or event.id < ends.get((recording.home.name, recording.id), 0):
            yield recording.group, event.labels


def _score(path: Path, dataset: Dataset, lost: Sequence[tuple[str, Sequence[str]]]) -> tuple[Scores, dict[str, Any], np.ndarray]:
    """Scores of a predictions file, what is lost counting as missing; the share of windows whose output was not well formed, all causes,
    and groups; the confusion of each group, [G, L, L + 1]."""
    by_group: dict[str, list[tuple[Sequence[str], str | None]]] = defaultdict(list)
    causes: Counter[str] = Counter()
    windows = malformed = 0
    for _, record in read_json_lines(path):
        windows += 1
        by_group[record["group"]] += zip(record["truth"], record["answer"], strict=True)
        causes.update(record["causes"])
        malformed += Answer(record["answer"], record["causes"]).malformed
    for group, truth in lost:
        by_group[group].append((truth, None))
        causes["dropped"] += 1
    counts = {"windows": windows, "malformed": malformed / windows, "malformed_windows": malformed, "causes": dict(sorted(causes.items()))}
    labels, pairs = _labels(dataset), [by_group[group] for group in sorted(by_group)]
    confusions = np.array([score(*zip(*group), labels).confusion for group in pairs])
    return score(*zip(*chain(*pairs)), labels), {**counts, "groups": len(pairs)}, confusions


def _parser() -> Parser:
    parser = Parser("harkd.eval", "Models and baselines label test windows and are scored.")
    models = f"a folder, a hub id, or {', '.join(f'baseline:{name}' for name in BASELINES)}; may be given several times"
    parser.add_argument("--model", action="append", help=models)
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
    samplings = {thinking: sampling_of(args, thinking) for thinking in {row.thinking for row in rows if not row.baseline}}
    rows = [row if row.baseline else replace(row, sampling=samplings[row.thinking]) for row in rows]
    how = read_options(args), args.dtype, guiding_of(args)
    settings = EvalSettings(tuple(rows), args.data, args.out, args.split, args.rules, args.limit, *how)
    return evaluate(settings, machine=machine_of(args), overwrite=args.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("harkd.eval", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
