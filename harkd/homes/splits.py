"""Which recordings train, validate and test.

Recordings that share a key (a person on a day, say) form a group, transitively; a group never stands on both sides of a split. Of n groups

    test        round(0.2 n), at least 1 where there are 2 groups
    validation  round(0.1 n), at least 1 where there are 3 groups
    train       the rest

and which groups those are is drawn by the SHA-256 of seed and name: the same on every machine and in any order of reading.
So are k folds: each is the test side once, the others train, and the predictions of all, pooled, cover every group out of fold.

What is drawn may be another unit than the group (`--split-by`), for other questions:

    subject     people never seen in training; a recording of people on different sides is left out
    scenario    scenarios never seen in training, of people who may have been, but on other days: of a group with scenarios on several
                sides, only the recordings that test stay, or else those that validate; the others are left out
    home        homes never seen in training
    days        later days: of each home's days in the order of time, not drawn, the first train, the last test, and one between two
                sides is left out; k folds are k stretches of days, without the days on either side of the one that tests. A group
                belongs to the day of its first event
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence

from harkd.errors import UserError
from harkd.homes.events import Recording

SPLITS = ("train", "validation", "test")
UNITS = ("group", "subject", "scenario", "home", "days")


def join_groups(keys: Mapping[str, Iterable[Hashable]]) -> dict[str, str]:
    """Map each recording to its group, named after the group's first recording. `keys` holds what each recording may share with others."""
    parent = {recording: recording for recording in keys}
    order = {recording: position for position, recording in enumerate(keys)}

    def root(recording: str) -> str:
        while parent[recording] != recording:
            parent[recording] = recording = parent[parent[recording]]
        return recording

    holder: dict[Hashable, str] = {}
    for recording, shared in keys.items():
        for key in shared:
            first, second = sorted((root(recording), root(holder.setdefault(key, recording))), key=order.__getitem__)
            parent[second] = first
    return {recording: root(recording) for recording in keys}


def sides(index: Sequence[Recording], by: str = "group", seed: int = 0, k: int = 0, fold: int = 0) -> list[str | None]:
    """The side of each recording, None where it is left out. With k folds it is "test" in fold number `fold`, from 1, and "train" in the
    others, or "fold 1" to "fold k" where `fold` is 0. Raises UserError where the recordings cannot be divided so.
    """
    units = [_units(recording, by) for recording in index]
    names = sorted({unit for of_recording in units for unit in of_recording})
    if by == "days":
        side_of = _in_time(index, k, fold)
    elif k:
        side_of = {unit: _side_in_fold(number + 1, fold) for unit, number in folds(names, k, seed).items()}
    else:
        side_of = assign_splits(names, seed)
    found = [{side_of[unit] for unit in of_recording} for of_recording in units]
    chosen = [of_recording.pop() if len(of_recording) == 1 else None for of_recording in found]
    if fold == 0 < k:
        return chosen
    if by == "scenario":
        kept: dict[str, str] = {}
        for recording, side in zip(index, chosen):
            kept[recording.group] = max(side, kept.get(recording.group, side), key=SPLITS.index)
        chosen = [side if side == kept[recording.group] else None for recording, side in zip(index, chosen)]
    if by != "group" and not {"train", "test"} <= set(chosen):
        raise UserError(f"--split-by {by} leaves no recording to {'train' if 'train' not in chosen else 'test'}: choose another --split-by")
    return chosen


def _units(recording: Recording, by: str) -> list[str]:
    """The names of what is drawn that a recording belongs to."""
    if by in ("group", "days"):
        return [recording.group]
    if by == "home":
        return [recording.home.name]
    told = [f"{recording.home.name}/{resident}" for resident in recording.residents] if by == "subject" else [recording.scenario]
    if not any(told):
        raise UserError(f"--split-by {by}: nothing tells the {by} of recording {recording.id!r}: choose another --split-by")
    return told


def _in_time(index: Sequence[Recording], k: int, fold: int) -> dict[str, str | None]:
    """The side of each group by the place of its day among those of its home."""
    found: dict[str, str | None] = {}
    for home in dict.fromkeys(recording.home.name for recording in index):
        begins = ((next(r.events(), None), r.group) for r in index if r.home.name == home)
        dated = sorted(((event.time.date(), group) for event, group in begins if event is not None), reverse=True)
        day_of = {group: day for day, group in dated}  # the first of its days is the last to be set
        days = sorted(set(day_of.values()))
        n = len(days)
        if n < max(5, k):
            raise UserError(f"--split-by days: {home} has {n} days, too few for {k or 3} sides")
        if k:
            blocks = [i * k // n + 1 for i in range(n)]
            near = {i + step for i, block in enumerate(blocks) if block == fold for step in (-1, 1)}
            placed = [None if i in near and block != fold else _side_in_fold(block, fold) for i, block in enumerate(blocks)]
        else:
            test, validation = (2 * n + 5) // 10, (n + 5) // 10
            placed = ["train"] * (n - test - validation - 2) + [None] + ["validation"] * validation + [None] + ["test"] * test
        side_of = dict(zip(days, placed, strict=True))
        found |= {group: side_of[day] for group, day in day_of.items()}
    return {recording.group: found.get(recording.group) for recording in index}  # those without events: nowhere


def _side_in_fold(number: int, fold: int) -> str:
    return ("test" if number == fold else "train") if fold else f"fold {number}"


def assign_splits(groups: Iterable[str], seed: int = 0) -> dict[str, str]:
    """Map each group to "train", "validation" or "test"."""
    drawn = _drawn(groups, seed)
    n = len(drawn)
    test = max(n >= 2, (2 * n + 5) // 10)  # whole numbers: 0.1 * n is not exact in floating point
    validation = max(n >= 3, (n + 5) // 10)
    sides = ["test"] * test + ["validation"] * validation + ["train"] * (n - test - validation)
    return dict(zip(drawn, sides, strict=True))


def folds(groups: Iterable[str], k: int, seed: int = 0) -> dict[str, int]:
    """Map each group to its fold, 0 to k - 1, of sizes that differ by one at most. Raises UserError unless 2 <= k <= number of groups."""
    drawn = _drawn(groups, seed)
    if not 2 <= k <= len(drawn):
        raise UserError(f"{len(drawn)} groups cannot be divided into {k} folds: choose 2 folds or more, and no more than there are groups")
    return {group: place % k for place, group in enumerate(drawn)}


def _drawn(groups: Iterable[str], seed: int) -> list[str]:
    return sorted(set(groups), key=lambda group: (hashlib.sha256(f"{seed}:{group}".encode()).digest(), group))


def check_split(split: str) -> str:
    """`split`, if it is one of train, validation, test and all. Raises UserError otherwise."""
    if split not in (*SPLITS, "all"):
        raise UserError(f"there is no split {split!r}: choose train, validation, test or all")
    return split
