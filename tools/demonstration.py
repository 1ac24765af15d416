"""The demonstration with its controls, over several homes: what a student of nano-teacher learns, and that it learns it from the traces.

    python -m tools.demonstration runs/demonstration [--seeds 10 11 12 13 14]       (the same command goes on where it was stopped)

For each seed S, nano-teacher reasons about the training days of home D<S>, and nano-student is trained from the same start by the same
recipe on

    true answers        no teacher, no reasoning
    shuffled traces     every window with the trace of another one: what a student learns from them is no more than the form
    all traces          whatever they say
    correct traces      those that agree with the truth at four events of five, as the doors do it
    correct answers     what these traces answer, without the reasoning before it

All of them, the teacher, the student before and two baselines then label the held-out days of D<S>, and of T<S>, a home that no one was
trained on. With --ways the student learns from the same guided traces in the four ways of --learn instead. Prints weighted F1: the mean
over the seeds that have a row with its 95% interval (Student's t), and the median, and the median seconds of training; the last line is
JSON. `controls.json` or `ways.json` keeps all of it; more seeds and rows (--only) join those that it holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from harkd.contestants import contestants
from harkd.distill.traces import Trace, TraceWriter, read_traces
from harkd.doors import STUDENT, TEACHER
from harkd.eval import EvalSettings, evaluate
from harkd.files import read_json, write_json
from harkd.generate import GenerateSettings, generate
from harkd.recognition import Guiding
from harkd.sampling.request import recommended
from harkd.scoring.table import align
from harkd.train import TrainSettings, train

BASELINES = ("baseline:majority", "baseline:sensor")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by number of seeds


def shuffle(traces: Sequence[Trace], seed: int) -> list[Trace]:
    """Give every window the answer of another one, drawn by `seed`."""
    order = Random(seed).sample(range(len(traces)), len(traces))
    to = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: none keeps its own
    return [
        replace(trace, messages=[*trace.messages[:-1], traces[to[i]].messages[-1]], answer=traces[to[i]].answer, agreement=0.0)
        for i, trace in enumerate(traces)
        if len(traces[to[i]].answer) == len(trace.answer)
    ]


def write_traces(seed: int, out: Path, guided: bool) -> None:
    """The teacher's traces of home D<seed>: with its probabilities to `out`/guided, or to `out`/traces, and `out`/shuffled of them."""
    how = {"sampling": replace(recommended(True), seed=seed), "guiding": Guiding(guided)}
    generate(GenerateSettings(TEACHER, f"simulated:D{seed}", f"{out}/{'guided' if guided else 'traces'}", **how))
    if not guided and not (out / "shuffled").exists():
        with TraceWriter(out / "shuffled.partial") as writer:
            for trace in shuffle(list(read_traces(out / "traces")), seed):
                if (trace.window, trace.sample) not in writer.done:
                    writer.write(trace)
        (out / "shuffled.partial").rename(out / "shuffled")


def controls(seed: int, out: Path) -> dict[str, TrainSettings]:
    """What the student is trained on, by name."""
    return {
        "true answers": TrainSettings(STUDENT, f"{out}/by-truth", train_on="truth", data=f"simulated:D{seed}", seed=seed),
        "shuffled traces": TrainSettings(STUDENT, f"{out}/by-shuffled", f"{out}/shuffled", keep="all", seed=seed),
        "all traces": TrainSettings(STUDENT, f"{out}/by-all", f"{out}/traces", keep="all", seed=seed),
        "correct traces": TrainSettings(STUDENT, f"{out}/by-correct", f"{out}/traces", seed=seed),
        "correct answers": TrainSettings(STUDENT, f"{out}/by-answers", f"{out}/traces", train_on="answer", seed=seed),
    }


def ways(seed: int, out: Path) -> dict[str, TrainSettings]:
    """The four ways to learn from the same guided traces, which hold the teacher's probabilities."""
    common = TrainSettings(STUDENT, "", f"{out}/guided", seed=seed)
    return {
        "sequence": replace(common, out=f"{out}/sequence"),
        "sequence and labels": replace(common, out=f"{out}/labels", learn="sequence,labels"),
        "logits": replace(common, out=f"{out}/logits", learn="logits", teacher=TEACHER),
        "sequence and on-policy": replace(common, out=f"{out}/on-policy", learn="sequence,on-policy", teacher=TEACHER),
    }


def one_seed(seed: int, out: Path, runs: Mapping[str, TrainSettings]) -> dict[str, dict[str, float]]:
    """Train what is to be trained. Weighted F1 of every row on both homes, and the seconds of each training."""
    for settings in runs.values():
        train(settings)
    named, rows = {TEACHER: "teacher", STUDENT: "student before"}, contestants([TEACHER, STUDENT, *BASELINES], [], None)
    found: dict[str, dict[str, float]] = {}
    for place, data in (("D", f"simulated:D{seed}"), ("T", f"simulated:T{seed}")):
        scored = {of["name"]: of for of in evaluate(EvalSettings(tuple(rows), data, f"{out}/eval-{place}"))["models"]}
        found[place] = {named.get(row.model, row.model): scored[row.name]["weighted_f1"] for row in rows}
        for name, settings in runs.items():  # each by itself, so that others may join later
            learnt = [row for row in contestants([STUDENT], [settings.out], None) if row.adapter]
            (of,) = evaluate(EvalSettings(tuple(learnt), data, f"{settings.out}-{place}"))["models"]
            found[place][f"student, {name}"] = of["weighted_f1"]
    found["seconds"] = {f"student, {name}": read_json(Path(run.out) / "cost.json")["seconds"] for name, run in runs.items()}
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its 95% interval (none for one seed), and median, over seeds."""
    mean, count = statistics.fmean(values), len(values)
    half = T_95[count] * statistics.stdev(values) / count**0.5 if count > 1 else None
    return {"mean": mean, "interval": half and [mean - half, mean + half], "median": statistics.median(values), "n": count}


def result_of(by_seed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """The rows over the seeds that have them, and how a student compares with the teacher in the median home."""
    trained = dict.fromkeys(name for of in by_seed.values() for name in of["seconds"])
    rows: dict[str, Any] = {}
    for row in (*BASELINES, "student before", *trained, "teacher"):
        having = [of for of in by_seed.values() if row in of["D"]]
        rows[row] = {place: summary([of[place][row] for of in having]) for place in ("D", "T")}
        if row in trained:
            rows[row]["seconds"] = statistics.median(of["seconds"][row] for of in having)
    homes = [of["D"] for of in by_seed.values()]
    ratios = {"teacher_f1": rows["teacher"]["D"]["median"]}
    ratios["teacher_minus_sensor"] = ratios["teacher_f1"] - rows["baseline:sensor"]["D"]["median"]
    for row in ("student before", *trained):
        ratios[f"{row} / teacher"] = statistics.median(home[row] / home["teacher"] for home in homes if row in home)
        ratios[f"teacher - {row}"] = statistics.median(home["teacher"] - home[row] for home in homes if row in home)
    return {"seeds": [int(seed) for seed in by_seed], "rows": rows, "ratios": ratios, "by_seed": by_seed}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows for people to read."""
    cells = [["", "homes", "D, held-out days", "median", "T, another home", "median", "seconds"]]
    for row, of in rows.items():
        cells.append([row, str(of["D"]["n"])])
        for found in (of["D"], of["T"]):
            interval = " [{:.3f}, {:.3f}]".format(*found["interval"]) if found["interval"] else ""
            cells[-1] += [f"{found['mean']:.3f}{interval}", f"{found['median']:.3f}"]
        cells[-1].append(f"{of['seconds']:.0f}" if "seconds" in of else "")
    return align(cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--ways", action="store_true", help="compare the ways to learn (--learn) instead of what is learnt from")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="train by these rows alone, such as 'correct traces'")
    args = parser.parse_args(argv)
    made = ways if args.ways else controls
    if unknown := set(args.only or ()) - made(0, args.out).keys():
        parser.error(f"--only: there is no {unknown.pop()!r}, but {', '.join(made(0, args.out))}")
    path = args.out / f"{made.__name__}.json"
    by_seed = read_json(path)["by_seed"] if path.exists() else {}
    if len({*by_seed, *map(str, args.seeds)}) > max(T_95):
        parser.error(f"--seeds: at most {max(T_95)} in one folder")
    for seed in args.seeds:
        out = args.out / str(seed)
        write_traces(seed, out, args.ways)
        runs = made(seed, out)
        found, before = one_seed(seed, out, {name: runs[name] for name in args.only or runs}), by_seed.get(str(seed), {})
        by_seed[str(seed)] = {part: {**before.get(part, {}), **of} for part, of in found.items()}
        result = result_of(dict(sorted(by_seed.items(), key=lambda item: int(item[0]))))
        write_json(path, result)
    print(table(result["rows"]))
    print(json.dumps({"ratios": result["ratios"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
