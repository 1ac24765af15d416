"""How data are read: options that every door offers as flags. Those that concern one data set say so."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from harkd.errors import UserError
from harkd.homes.noise import parse_noise
from harkd.homes.splits import UNITS


def _flag(default: Any, told: str, **how: Any) -> Any:
    """A field of that default whose flag says `told`; `how`: what else argparse is given."""
    return field(default=default, metadata={"default": default, "help": told, **how})


_KINDS = "drop=0.1,jitter=30s,ghost=0.05,stuck=SENSOR or 0.05,rename=0.1,swap-rooms,shift=2h,speed=0.5"


@dataclass(frozen=True)
class ReadOptions:
    """Each field but `window`, the events of one, has a flag of its name."""

    transition: str = _flag("ignore", "offer MARBLE's TRANSITION, or leave it unscored", choices=["label", "ignore"])
    utc_offset: float = _flag(1.0, "local clock ahead of UTC, where a data set stores UTC", metavar="HOURS", type=float)
    smartphone: bool = _flag(False, "read MARBLE's phone events too", action="store_true")
    window: int = 10
    split_seed: int = _flag(0, "which groups train, validate and test", type=int)
    split_by: str = _flag("group", "what never stands on both sides of a split", choices=UNITS)  # harkd.homes.splits
    folds: int = _flag(0, "K folds in place of train, validation and test", metavar="K", type=int)
    fold: int = _flag(0, "the fold that tests, from 1, while the others train", metavar="N", type=int)
    noise: str = _flag("", f"faults of sensors and clocks, among {_KINDS}", metavar="SPEC")  # harkd.homes.noise
    noise_seed: int = _flag(0, "which events and sensors the faults befall", type=int)

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
    """The flags of ReadOptions."""
    group = parser.add_argument_group("data")
    for option in fields(ReadOptions):
        if option.metadata:
            group.add_argument(f"--{option.name.replace('_', '-')}", **option.metadata)


def read_options(args: argparse.Namespace) -> ReadOptions:
    """The options that the flags of `add_data_arguments` ask for."""
    return ReadOptions(**{option.name: getattr(args, option.name) for option in fields(ReadOptions) if option.metadata})
