"""How data are read: options that every door offers as flags. Those that concern one data set say so."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from harkd.errors import UserError
from harkd.homes.noise import parse_noise
from harkd.homes.splits import UNITS


@dataclass(frozen=True)
class ReadOptions:
    """Each field but `window` has a flag of its name."""

    transition: str = "ignore"  # MARBLE's TRANSITION: "ignore" leaves its events unscored, "label" offers it as an activity
    utc_offset: float = 1.0  # hours of the local clock ahead of UTC, where a data set stores UTC
    smartphone: bool = False  # MARBLE's phone events too
    window: int = 10  # events per window
    split_seed: int = 0
    split_by: str = "group"  # what is never on both sides: harkd.homes.splits
    folds: int = 0  # divide into so many folds in place of train, validation and test
    fold: int = 0  # the one that tests, from 1
    noise: str = ""  # faults put into every recording, as harkd.homes.noise describes them
    noise_seed: int = 0

    def __post_init__(self) -> None:
        if self.transition not in ("label", "ignore"):
            raise UserError(f"--transition is label or ignore, not {self.transition!r}")
        if not -24 < self.utc_offset < 24:
            raise UserError(f"--utc-offset is a number of hours between -24 and 24, not {self.utc_offset}")
        if self.split_by not in UNITS:
            raise UserError(f"--split-by is one of {', '.join(UNITS)}, not {self.split_by!r}")
        if self.folds < 0 or self.folds == 1 or not 0 <= self.fold <= self.folds:
            raise UserError(f"--folds is 2 or more and --fold one of them, from 1, not {self.folds} and {self.fold}")
        parse_noise(self.noise)
        if self.window < 1:
            raise UserError(f"a window holds at least one event, not {self.window}")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--transition, --utc-offset, --smartphone, --split-by, --folds, --fold, --split-seed, --noise and --noise-seed."""
    default = ReadOptions()
    group = parser.add_argument_group("data")
    group.add_argument(
        "--transition", choices=["label", "ignore"], default=default.transition, help="offer MARBLE's TRANSITION, or leave it unscored"
    )
    group.add_argument("--utc-offset", type=float, default=default.utc_offset, metavar="HOURS", help="local clock ahead of UTC")
    group.add_argument("--smartphone", action="store_true", help="read MARBLE's phone events too")
    group.add_argument("--split-seed", type=int, default=default.split_seed, help="which groups train, validate and test")
    group.add_argument("--split-by", choices=UNITS, default=default.split_by, help="what never stands on both sides of a split")
    group.add_argument("--folds", type=int, default=default.folds, metavar="K", help="K folds in place of train, validation and test")
    group.add_argument("--fold", type=int, default=default.fold, metavar="N", help="the fold that tests, from 1, while the others train")
    kinds = "drop=0.1,jitter=30s,ghost=0.05,stuck=SENSOR or 0.05,rename=0.1,swap-rooms,shift=2h,speed=0.5"
    group.add_argument("--noise", default=default.noise, metavar="SPEC", help=f"faults of sensors and clocks, among {kinds}")
    group.add_argument("--noise-seed", type=int, default=default.noise_seed, help="which events and sensors the faults befall")


def read_options(args: argparse.Namespace) -> ReadOptions:
    """The options that the flags of `add_data_arguments` ask for."""
    names = (field.name for field in fields(ReadOptions) if field.name != "window")
    return ReadOptions(**{name: getattr(args, name) for name in names})
