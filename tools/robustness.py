"""How scores bear faults and change: curves of weighted F1 over levels of noise, or over weeks in a simulated home where something changes.

    python -m tools.robustness runs/noise --model baseline:sensor --model baseline:hmm --data marble:PATH \\
        --level "" --level drop=0.1 --level drop=0.2 --level drop=0.4
    python -m tools.robustness runs/drift --model nano-student --adapter runs/default/adapter --model baseline:naive-bayes \\
        --data simulated:D3 --drift

Drift: baselines learn from the first two weeks. The next two are as these were; in the four behind them

    nothing     is changed: how much weeks differ anyway
    sensor      the busiest sensor is silent: its events are missing
    routine     the household lives three hours later
    resident    somebody moves in

`nothing`, `sensor` and `routine` are scored over the same events. A model is not trained here: it is scored as it
is. OUT holds one run of harkd.eval, with --report its report.md, and a picture for each curve; the last line is JSON, as harkd.eval's.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from harkd.contestants import contestants
from harkd.doors import Parser, add_model_arguments, add_sampling_arguments, enter, guiding_of, machine_of, sampling_of
from harkd.errors import UserError
from harkd.eval import EvalSettings, evaluate, report
from harkd.files import write_text
from harkd.homes.dataset import Dataset, ReadOptions, add_data_arguments, read, read_options
from harkd.homes.events import Event, Recording, Window
from harkd.homes.simulated import house, recordings
from harkd.scoring import plots

LEARNT, PERIOD, PERIODS = 14, 14, 3  # days
LATER = "shift=3h"


@dataclass(frozen=True)
class Weeks(Dataset):
    """Days of a simulated home, of which the first LEARNT train and the others test, these without the sensor that is dead."""

    dead: tuple[str, str] | None = None  # room, name

    @cached_property
    def _sides(self) -> dict[tuple[str, str], str | None]:
        return {(day.home.name, day.id): "test" if n >= LEARNT else "train" for n, day in enumerate(self.index)}

    def lost(self, split: str = "all") -> Iterator[tuple[Recording, Event]]:
        return ((day, event) for day in self.recordings(split) for event in day.events() if self._fails(day, event))

    def _windows(self, recording: Recording) -> Iterator[Window]:
        heard = replace(recording, events=lambda: (event for event in recording.events() if not self._fails(recording, event)))
        return super()._windows(heard)

    def _fails(self, day: Recording, event: Event) -> bool:
        return (event.room, event.sensor) == self.dead and self.side_of(day) == "test"


def drift(name: str) -> dict[str, list[Dataset]]:
    """The periods of a simulated home such as "D3", by what changes after the first."""
    home = house(name)
    grown = replace(home, residents=(*home.residents, f"R{len(home.residents) + 1}"))
    learnt = recordings(home, range(1, LEARNT + 1))
    busiest, _ = Counter((event.room, event.sensor) for day in learnt for event in day.events()).most_common(1)[0]
    found: dict[str, list[Dataset]] = {}
    for kind in ("nothing", "sensor", "routine", "resident"):
        for period in range(PERIODS):
            first = LEARNT + 1 + period * PERIOD
            there = grown if kind == "resident" and period else home  # the same draws, but for who is new
            days = recordings(there, range(first, first + PERIOD))
            weeks = f"days {first} to {first + PERIOD - 1}"
            options = ReadOptions(noise=LATER if kind == "routine" and period else "")
            dead = busiest if kind == "sensor" and period else None
            data = Weeks(f"{kind}, {weeks}" if period else weeks, (home.home,), (*learnt, *days), options, dead)
            found.setdefault(kind, []).append(data)
    return found


def levels(name: str, specs: Sequence[str], options: ReadOptions) -> list[Dataset]:
    """A data set at each level of noise."""
    return [replace(read(name, options, noise=spec), name=spec or "clean") for spec in dict.fromkeys(specs)]


def run(argv: Sequence[str] | None) -> dict[str, Any]:
    """Evaluate, draw, and return eval's result."""
    args = _arguments(argv)
    options = read_options(args)
    if args.drift and not args.data.startswith("simulated:"):
        raise UserError("--drift needs a simulated home: --data simulated:D3, say")
    if options.noise or args.drift and options != ReadOptions():
        raise UserError("--level names the noise, and --drift has days of its own: leave --noise and such flags of data out")
    if args.report:
        plots.need()
    found = drift(args.data.partition(":")[2]) if args.drift else {"noise": levels(args.data, args.level, options)}
    datasets = {dataset.name: dataset for curve in found.values() for dataset in curve}  # all kinds begin with the same weeks
    rows = contestants(args.model, args.adapter, args.thinking, partial(sampling_of, args))
    how = {"limit": args.limit, "options": options, "dtype": args.dtype, "guiding": guiding_of(args)}
    settings = EvalSettings(tuple(rows), (args.data, *datasets), f"{args.out}/eval", **how)
    result = evaluate(settings, machine=machine_of(args), datasets=list(datasets.values()))
    scores = {(row["data"], row["name"]): (row["weighted_f1"] or 0.0, row["weighted_f1_interval"]) for row in result["models"]}
    for kind, curve in found.items() if plots.installed() else ():
        lines = {row.name: [scores[dataset.name, row.name] for dataset in curve] for row in rows}
        places = [dataset.name.removeprefix(f"{kind}, ") for dataset in curve]
        plots.curves(Path(args.out) / f"{kind}.png", lines, places, f"{args.data}: {kind}")
    if args.report:
        command = shlex.join(["python", "-m", "tools.robustness", *(sys.argv[1:] if argv is None else argv)])
        report(settings, result, command, list(datasets.values()))
        path = Path(settings.out) / "report.md"
        write_text(path, "\n\n".join(["# Curves", *(f"![{kind}](../{kind}.png)" for kind in found), path.read_text(encoding="utf-8")]))
        print(f"the report is in {path}")
    return result


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("tools.robustness", "Curves of weighted F1 over levels of noise, or over weeks.")
    parser.add_argument("out", metavar="OUT", help="a folder for the run and the pictures")
    parser.add_argument("--model", action="append", required=True, help="as for harkd.eval")
    parser.add_argument("--adapter", action="append", default=[], help="as for harkd.eval")
    parser.add_argument("--data", required=True, help="READER:PATH")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--level", action="append", help='a level of noise, as --noise of harkd.eval, several times; "" is none')
    kind.add_argument("--drift", action="store_true", help="weeks of a simulated home in place of noise")
    parser.add_argument("--limit", type=int, help="only the first so many windows of each level or period")
    parser.add_argument("--report", action="store_true", help="write eval/report.md, which shows the curves too")
    parser.add_switch("--thinking", None, "as for harkd.eval")
    for add in (add_data_arguments, add_model_arguments, add_sampling_arguments):
        add(parser)
    args = parser.parse_args(argv)
    parser.at_least_one(args, "limit", "batch", "cache_tokens")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("tools.robustness", run, argv)


if __name__ == "__main__":
    sys.exit(main())
