"""Which recordings train, validate and test.

Recordings that share a key (a person on a day, say) form a group, transitively; a group never stands on both sides of a split. Of n groups

    test        round(0.2 n), at least 1 where there are 2 groups
    validation  round(0.1 n), at least 1 where there are 3 groups
    train       the rest

and which groups those are is drawn by the SHA-256 of seed and name: the same on every machine and in any order of reading.
So are k folds: each is the test side once, the others train, and the predictions of all, pooled, cover every group out of fold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping

from harkd.errors import UserError

SPLITS = ("train", "validation", "test")


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
