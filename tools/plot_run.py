"""Draw a training run's metrics as one PNG: losses, F1, learning rate and gradient norm, speed.

    python -m tools.plot_run runs/adapter            (writes runs/adapter/metrics.png; --out FILE names another)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harkd.errors import UserError
from harkd.files import replacing
from harkd.jsonl import read_json_lines
from harkd.scoring.plots import need

PANELS = (("loss", "validation_loss"), ("validation_f1",), ("lr",), ("grad_norm",), ("tokens_per_second",))  # what shares an axis


def draw(metrics: Path, out: Path) -> list[str]:
    """Draw what the file holds, a panel for each kind of figure. Returns the names drawn. UserError where there is nothing to draw."""
    need()
    from matplotlib.figure import Figure

    records = [record for _, record in read_json_lines(metrics)]
    ways = [f"ways.{way}" for way in dict.fromkeys(way for record in records for way in record.get("ways", ()))]
    records = [{**record, **{f"ways.{way}": value for way, value in record.get("ways", {}).items()}} for record in records]
    series = {}
    for name in (*(name for panel in PANELS for name in panel), *(ways if len(ways) > 1 else ())):
        series[name] = [(record["step"], record[name]) for record in records if name in record]
    panels = [[name for name in panel if series[name]] for panel in (PANELS[0], ways if len(ways) > 1 else (), *PANELS[1:])]
    panels = [panel for panel in panels if panel]
    if not panels:
        raise UserError(f"{metrics} holds no step yet")
    figure = Figure((7, 2.2 * len(panels)), dpi=120, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for name in panel:
            style = "o-" if name.startswith("validation") else "-"
            axes.plot(*zip(*series[name], strict=True), style, markersize=3, linewidth=1, label=name)
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("step")
    with replacing(out) as file:
        figure.savefig(file, format="png")
    return [name for panel in panels for name in panel]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run of harkd.train")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    try:
        out = args.out or args.run / "metrics.png"
        print(f"{out}: {', '.join(draw(args.run / 'metrics.jsonl', out))}")
    except UserError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
