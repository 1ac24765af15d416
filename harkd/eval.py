"""Door 3: models and baselines label the same test windows with the same prompts, and are scored against the truth.

    python -m harkd.eval --model Qwen/Qwen3-0.6B --adapter runs/adapter --model baseline:sensor --data marble:PATH --out runs/eval

Each `--model` is a row of the comparison, and so is each `--adapter` on its base. A base that an adapter was trained on is evaluated in the
adapter's mode, with or without reasoning, so that before and after differ in nothing else. Baselines are fitted on the training split
without noise, whatever is evaluated; with `--folds K` on K - 1 folds each time, and the predictions of all folds are scored together.
A model is not fitted here: with folds it is scored on windows that its adapter must not have been trained on.
`--data`, given several times, makes as many tables. `metrics.json` holds scores alone, with 95% intervals and every row's difference from
the first on the same data; what depends on the machine is in `cost.json`. Where matplotlib is installed, `timeline.png` shows one recording
of the first data set as the best row sees it; `--report` adds `report.md` and its pictures.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harkd.contestants import Contestant, check_files, contestants
from harkd.doors import (
    DEFAULT_RUNS, SIMULATED, STUDENT, TEACHER, TRANSFER, Parser, RunFolder, add_model_arguments, add_sampling_arguments, digests, enter,
    guiding_of, machine_of, sampling_of,
)  # fmt: skip
from harkd.errors import UserError
from harkd.files import write_json
from harkd.homes.dataset import Dataset, ReadOptions, add_data_arguments, group_digest, read, read_options
from harkd.homes.events import Window
from harkd.jsonl import JsonLinesWriter, read_json_lines
from harkd.memory import peak_memory, reset_peak_memory
from harkd.recognition import (
    Guiding, Machine, check_fit, completions, first_windows, load_generator, probabilities, read_answer, request, reread,
)  # fmt: skip
from harkd.sampling.request import Request
from harkd.scoring.baselines import BASELINES, baseline
from harkd.scoring.baselines import answers as baseline_answers
from harkd.scoring import plots
from harkd.scoring.intervals import LEAST, paired_differences
from harkd.scoring.metrics import FIGURES
from harkd.scoring.predictions import costs, read_records, score_records
from harkd.scoring.report import counts, look, write_report, write_timeline
from harkd.scoring.table import tables

if TYPE_CHECKING:
    from harkd.sampling.generator import Completion


FILES = ("metrics.json", "predictions-*.jsonl", "timeline.png", "report.md", "report-*.png")


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate, on which windows; `data` is one name or several, `limit` counts the windows of each, and of each fold."""

    contestants: tuple[Contestant, ...]
    data: str | tuple[str, ...]
    out: str
    split: str = "test"
    rules: bool = True
    limit: int | None = None
    options: ReadOptions = ReadOptions()
    dtype: str | None = None
    guiding: Guiding = Guiding()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) else tuple(dict.fromkeys(self.data)))


def evaluate(
    settings: EvalSettings, *, machine: Machine = Machine(), overwrite: bool = False, datasets: Sequence[Dataset] = ()
) -> dict[str, Any]:
    """Let every contestant label every window, continuing what is there, and write metrics.json. Returns {"models": [scores of each]}.

    `datasets`, of different names, stand in for those that `settings.data` names.
    """
    from harkd.qwen3.weights import as_device, model_size

    datasets = datasets or [read(name, settings.options) for name in settings.data]
    models = [row for row in settings.contestants if not row.baseline]
    inputs = digests((row.model for row in models), (row.adapter for row in models), data=settings.data)
    folder = RunFolder(settings.out, "eval", asdict(settings), overwrite, FILES, inputs)
    if folder.result is not None:
        print(tables(folder.result["models"]))
        return folder.result
    groups = Counter(group_digest(window) for dataset in datasets for window in _windows(settings, dataset))
    for contestant in models:
        check_files(contestant, groups)
    for contestant in {(row.model, row.thinking, row.sampling): row for row in models}.values():  # an adapter changes no prompt
        asked = (one for dataset in datasets for _, one in _asked(contestant, settings, dataset, _windows(settings, dataset)))
        check_fit(contestant.model, asked, machine)
    if any(row.adapter for row in models) and any(len(dataset.folded()) > 1 for dataset in datasets):
        print("warning: --folds scores all windows, also those that an adapter was trained on; --fold N tests one fold", file=sys.stderr)
    if settings.split in ("train", "all") and len(models) < len(settings.contestants):
        print(f"warning: --split {settings.split} scores baselines on the windows that they were fitted on, too", file=sys.stderr)
    as_device(machine.device)
    folder.begin()
    spent: dict[str, dict[str, Any]] = {}
    # baselines, then adapters: faults of the training files, and an adapter that does not fit its base, show before hours go into the rest
    for contestant in sorted(settings.contestants, key=lambda row: (not row.baseline, row.adapter is None)):
        reset_peak_memory()
        worked = _predict(contestant, settings, datasets, folder.path / contestant.file, groups.total(), machine)
        size = {"parameters": 0, "bytes": 0} if contestant.baseline else model_size(contestant.model, settings.dtype)
        spent[contestant.name] = size | ({"peak_memory_bytes": peak_memory()} if worked else {})
    rows, metrics, answers = _scores(settings, datasets, folder.path, spent)
    write_json(folder.path / "metrics.json", {"data": [dataset.name for dataset in datasets], "split": settings.split, "models": metrics})
    for dataset, found in zip(datasets, metrics[:: len(settings.contestants)]):
        print(_told(settings, dataset, found))
    print(f"\n{tables(rows)}")
    if plots.installed():
        best = max(rows[: len(settings.contestants)], key=lambda row: row["weighted_f1"] or 0)["name"]
        run = look(_windows(settings, datasets[0])).recording
        write_timeline(folder.path / "timeline.png", run, answers[best], _labels(datasets[0]), best)
    peaks = [cost["peak_memory_bytes"] for cost in spent.values() if "peak_memory_bytes" in cost] or [peak_memory()]
    peak = {name: max(found.get(name, 0) for found in peaks) for name in peaks[0]}
    return folder.finish({"models": rows}, {"peak_memory_bytes": peak, "models": spent})


def report(settings: EvalSettings, result: dict[str, Any], command: str = "", datasets: Sequence[Dataset] = ()) -> None:
    """Write report.md and its pictures for a run that is done. Raises UserError without matplotlib."""
    windows = {data.name: _windows(settings, data) for data in datasets or [read(name, settings.options) for name in settings.data]}
    folder = Path(settings.out)
    write_report(folder, {row.name: folder / row.file for row in settings.contestants}, windows, result, command)


def _windows(settings: EvalSettings, dataset: Dataset, done: Set[str] = frozenset()) -> Iterator[Window]:
    """The windows to label, of all folds where there are any."""
    parts = dataset.folded()
    if len(parts) > 1 and settings.split != "test":
        raise UserError(f"--folds tests each fold in turn: leave --split {settings.split} out, or choose one with --fold")
    every = chain.from_iterable(first_windows(part, settings.split, settings.limit) for part in parts)
    return (window for window in every if window.id not in done)


def _asked(contestant: Contestant, settings: EvalSettings, dataset: Dataset, work: Iterable[Window]) -> Iterator[tuple[Window, Request]]:
    """Each window with what a model is asked about it."""
    how = {"thinking": contestant.thinking, "sampling": contestant.sampling, "rules": settings.rules, "guiding": settings.guiding}
    return ((window, request(dataset.home(window.home), window, **how)) for window in work)


def _predict(
    contestant: Contestant, settings: EvalSettings, datasets: Sequence[Dataset], path: Path, total: int, machine: Machine
) -> bool:
    """Write the predictions that `path` lacks, each with the seconds since the one before. Returns whether there were any."""
    from tqdm import tqdm

    with JsonLinesWriter(path) as writer:
        done = {(record["data"], record["window"]) for _, record in read_json_lines(path)}
        work = datasets if len(done) < total else ()  # else no model is loaded, and no baseline fitted
        what = contestant.model, contestant.adapter, settings.dtype, machine
        generator = load_generator(*what) if work and not contestant.baseline else None
        last = time.perf_counter()
        with tqdm(total=total, initial=len(done), desc=contestant.name, unit="window", file=sys.stderr) as progress:
            for dataset in work:
                known = {window for name, window in done if name == dataset.name}
                if generator is None:
                    answers = (pair for pair in _baseline_answers(contestant, settings, dataset) if pair[0].id not in known)
                else:
                    asked = _asked(contestant, settings, dataset, _windows(settings, dataset, known))
                    answers = _model_answers(dataset, completions(generator, asked))
                for window, record in answers:
                    truth = [list(event.labels) for event in window.events]
                    where = {"data": dataset.name, "window": window.id, "home": window.home, "group": window.group}
                    last, before = time.perf_counter(), last
                    took = {"seconds": round(last - before, 6)}
                    writer.append({**where, "recording": window.recording, "truth": truth, **record, **took}, sync=generator is not None)
                    progress.update()
    return bool(work)


def _baseline_answers(contestant: Contestant, settings: EvalSettings, dataset: Dataset) -> Iterator[tuple[Window, dict[str, Any]]]:
    """Fit on the training split without noise, whatever is evaluated, and label all windows: one baseline reads whole recordings."""
    for part in dataset.folded():
        clean = replace(part, options=replace(part.options, noise=""))
        fitted = baseline(contestant.baseline).fit(clean.windows("train"), _labels(dataset))
        for window, labels in baseline_answers(fitted, first_windows(part, settings.split, settings.limit)):
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


def _labels(dataset: Dataset) -> list[str]:
    """The labels on offer in any home, in their order."""
    return list(dict.fromkeys(name for home in dataset.homes for name in home.label_names))


def _lost(settings: EvalSettings, dataset: Dataset) -> Iterator[tuple[str, Sequence[str]]]:
    """Group and true labels of the events that noise took from the evaluated stretch of each recording."""
    ends = Counter[tuple[str, str]]()
    for window in _windows(settings, dataset) if settings.limit is not None else ():
        ends[window.home, window.recording] = max(ends[window.home, window.recording], *(event.id for event in window.events))
    for recording, event in chain.from_iterable(part.lost(settings.split) for part in dataset.folded()):
        if settings.limit is None or event.id < ends[recording.home.name, recording.id]:
            yield recording.group, event.labels


def _scores(
    settings: EvalSettings, datasets: Sequence[Dataset], folder: Path, spent: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, dict[str, Sequence[str | None]]]]:
    """Rows of the result and entries of metrics.json, for each data set one of each contestant; and each contestant's answers to the
    windows of the first data set. `spent` learns what the predictions took.
    """
    lost, first, answers = [list(_lost(settings, dataset)) for dataset in datasets], {}, {}
    scored = {}
    for contestant in settings.contestants:
        of_data = read_records(folder / contestant.file)
        spent[contestant.name] |= costs(chain.from_iterable(of_data.values()))
        answers[contestant.name] = {record["window"]: record["answer"] for record in of_data[datasets[0].name]}
        for n, dataset in enumerate(datasets):
            again = lambda record: reread(record, dataset.home(record["home"]).label_names)  # noqa: E731, B023
            records = of_data[dataset.name]
            scores, confusions = score_records(records, _labels(dataset), lost[n], again)
            against = paired_differences(confusions, first[n]) if n in first else None
            first.setdefault(n, confusions)
            name = {"name": contestant.name, "data": dataset.name}
            row = {**name, **{figure: scores[figure] for figure in (*FIGURES, "missing", "malformed")}}
            row["weighted_f1_interval"] = scores["intervals"] and scores["intervals"]["weighted_f1"]
            row["parameters"] = spent[contestant.name]["parameters"]
            row["seconds_per_window"] = costs(records)["seconds_per_window"]
            scored[n, len(answers)] = row, {**name, **scores, "against_first": against}
    rows, metrics = zip(*(scored[place] for place in sorted(scored)), strict=True)
    return list(rows), list(metrics), answers


def _told(settings: EvalSettings, dataset: Dataset, scores: dict[str, Any]) -> str:
    """What was evaluated, and why there are no intervals where there are none."""
    text = f"{dataset.name}: {counts(scores, settings.split)}"
    if dataset.left_out:
        of_fold = " of a fold at most" if len(dataset.folded()) > 1 else ""
        text += f"; {dataset.left_out} recordings are left out{of_fold} by --split-by {dataset.options.split_by}"
    if scores["intervals"] is None:
        few = f"{text}\n{scores['groups']} groups are too few for intervals, which need {LEAST}"
        return few if dataset.options.folds else f"{few}: --folds K scores all groups"
    return text


def _parser() -> Parser:
    parser = Parser("harkd.eval", "Models and baselines label test windows and are scored.")
    models = f"a folder, a hub id, {TEACHER}, {STUDENT}, or {', '.join(f'baseline:{name}' for name in BASELINES)}; several times"
    parser.add_argument("--model", action="append", help=models)
    parser.add_argument("--adapter", action="append", default=[], help="a LoRA adapter of one of the models; may be given several times")
    data = f"READER:PATH, for instance marble:PATH, several times; {SIMULATED} without it, and {TRANSFER} too without --model"
    parser.add_argument("--data", action="append", help=data)
    parser.add_argument("--split", default="test", help="train, validation, test or all")
    parser.add_argument("--out", default=f"{DEFAULT_RUNS}/eval", help="the run's folder")
    parser.add_switch("--thinking", None, "reason before the answer; as the adapter was trained, else yes")
    parser.add_switch("--rules", True, "put the rules for ambiguous cases into the prompt")
    parser.add_argument("--limit", type=int, help="only the first so many windows of each data set and fold")
    parser.add_argument("--report", action="store_true", help="write report.md with pictures too, of a run that is done as well")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    args = parser.parse_args(argv)
    parser.at_least_one(args, "limit", "batch", "cache_tokens")
    if args.model is None:  # the models that ship with harkd, before and after what the other doors did without arguments
        args.model = [TEACHER, STUDENT, "baseline:majority", "baseline:sensor"]
        args.adapter, args.data = args.adapter or [f"{DEFAULT_RUNS}/adapter"], args.data or [SIMULATED, TRANSFER]
        if not Path(args.adapter[0]).is_dir():
            parser.error(f"there is no adapter {args.adapter[0]}: run harkd.train first, or name a --model")
    rows = contestants(args.model, args.adapter, args.thinking, partial(sampling_of, args))
    data, how = args.data or SIMULATED, (read_options(args), args.dtype, guiding_of(args))
    settings = EvalSettings(tuple(rows), data, args.out, args.split, args.rules, args.limit, *how)
    if args.report:
        plots.need()  # told before hours of work
    result = evaluate(settings, machine=machine_of(args), overwrite=args.overwrite)
    if args.report:
        report(settings, result, shlex.join(["python", "-m", "harkd.eval", *(sys.argv[1:] if argv is None else argv)]))
        print(f"the report is in {Path(settings.out) / 'report.md'}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("harkd.eval", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
