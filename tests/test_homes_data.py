"""Events, windows, splits and data sets."""

import os
import subprocess
import sys
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harkd.errors import UserError
from harkd.homes.dataset import ReadOptions, read
from harkd.homes.events import Event, Home, Recording
from harkd.homes.splits import assign_splits, folds, join_groups
from harkd.homes.windows import windows
from tests.helpers import ROOT
from tests.marble_files import recording

HOME = Home("h", (), ())


def test_importing_the_part_loads_neither_torch_nor_numpy():
    code = "import sys, harkd.homes.dataset, harkd.homes.prompt; sys.exit(bool({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("room", "sensor", "state", "description"),
    [
        ("kitchen", "fridge", "opened", "kitchen fridge opened"),
        ("", "R9", "turned ON", "R9 turned ON"),
        (" a\t b", " c ", "d\n", "a b c d"),
    ],
)
def test_description_has_single_blanks(room, sensor, state, description):
    assert Event(0, datetime(2020, 1, 1), sensor, room, state).description == description


# windows


def a_recording(events: int) -> Recording:
    one_a_minute = [Event(n, datetime(2020, 1, 1, 12, n), "s", "r", "on") for n in range(events)]
    return Recording("a/b", HOME, "g", ("x",), lambda: iter(one_a_minute))


@pytest.mark.parametrize(
    ("events", "sizes"), [(0, []), (1, [1]), (9, [9]), (10, [10]), (11, [10, 1]), (30, [10, 10, 10]), (35, [10, 10, 10, 5])]
)
def test_windows_do_not_overlap_and_keep_the_short_last_one(events, sizes):
    cut = list(windows(a_recording(events)))
    assert [len(window.events) for window in cut] == sizes
    assert [event.id for window in cut for event in window.events] == list(range(events))
    assert [window.id for window in cut] == [f"h/a/b/{number:04d}" for number in range(len(sizes))]
    assert all((window.home, window.group, window.recording) == ("h", "g", "a/b") for window in cut)


def test_windows_are_cut_while_events_arrive():
    """No more events are drawn than the window needs: a recording is never held as a whole."""
    drawn = []

    def events():
        for event in a_recording(25).events():
            drawn.append(event.id)
            yield event

    first = next(windows(Recording("a", HOME, "g", (), events), 10))
    assert len(first.events) == 10 and drawn == list(range(10))


# groups and splits


def test_groups_join_what_shares_a_key_transitively():
    keys = {"a": [1], "b": [2], "c": [2, 3], "d": [3, 4], "e": [], "f": [4, 1], "g": [5], "h": [5], "i": []}
    assert join_groups(keys) == {**dict.fromkeys("abcdf", "a"), "e": "e", "g": "g", "h": "g", "i": "i"}


@given(st.dictionaries(st.text(max_size=2), st.lists(st.integers(0, 12), max_size=3), max_size=12))
def test_groups_equal_connected_components(keys):
    """Against the closure of 'shares a key' computed by brute force."""
    reach = {name: {other for other in keys if other == name or set(keys[name]) & set(keys[other])} for name in keys}
    for _ in keys:
        reach = {name: set().union(*(reach[other] for other in near)) for name, near in reach.items()}
    groups = join_groups(keys)
    for name in keys:
        assert {other for other in keys if groups[other] == groups[name]} == reach[name]
        assert groups[name] == next(other for other in keys if other in reach[name])


@pytest.mark.parametrize(
    ("groups", "train", "validation", "test"),
    [
        (0, 0, 0, 0),
        (1, 1, 0, 0),
        (2, 1, 0, 1),
        (3, 1, 1, 1),
        (4, 2, 1, 1),
        (5, 3, 1, 1),
        (10, 7, 1, 2),
        (12, 9, 1, 2),
        (15, 10, 2, 3),
        (100, 70, 10, 20),
    ],
)
def test_split_sizes(groups, train, validation, test):
    sides = list(assign_splits(f"g{n}" for n in range(groups)).values())
    assert [sides.count(side) for side in ("train", "validation", "test")] == [train, validation, test]


def test_splits_depend_on_the_seed_alone():
    names = [f"g{n}" for n in range(20)]
    drawn = assign_splits(names, 3)
    assert assign_splits(reversed(names * 2), 3) == drawn
    assert len({tuple(sorted(assign_splits(names, seed).items())) for seed in range(5)}) == 5
    # as `printf 3:g0 | sha256sum` and so on sort: no later version may draw otherwise, or results could not be compared
    assert [name for name in names if drawn[name] == "test"] == ["g0", "g10", "g13", "g19"]
    assert [name for name in names if drawn[name] == "validation"] == ["g15", "g18"]


def test_splits_do_not_depend_on_pythons_hash():
    code = "from harkd.homes.splits import assign_splits; print(sorted(assign_splits([str(n) for n in range(30)]).items()))"
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, check=True)
        for seed in "12"
    ]
    outputs = {run.stdout for run in runs}
    assert len(outputs) == 1


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 5))
def test_folds_are_of_equal_size_and_depend_on_the_seed_alone(n, k, seed):
    names = [f"g{i}" for i in range(n)]
    if k > n:
        with pytest.raises(UserError, match=f"{n} groups cannot be divided into {k} folds"):
            folds(names, k, seed)
        return
    made = folds(names, k, seed)
    sizes = [list(made.values()).count(fold) for fold in range(k)]
    assert set(made) == set(names) and sum(sizes) == n and max(sizes) - min(sizes) <= 1
    assert folds(reversed(names * 2), k, seed) == made


def test_folds_are_drawn_as_splits_are():
    made, sides = folds([f"g{n}" for n in range(20)], 5, 3), assign_splits((f"g{n}" for n in range(20)), 3)
    assert sorted(made[group] for group, side in sides.items() if side == "test") == [0, 1, 2, 3]  # the first four drawn
    assert made != folds(made, 5, 4)
    for k in (-1, 0, 1):
        with pytest.raises(UserError):
            folds(made, k)


# data sets


@pytest.fixture
def data(tmp_path):
    for day in range(4):
        recording(tmp_path, f"A1m/instance{day + 1}", "abcd"[day], 24, day)
    return f"marble:{tmp_path}"


def test_a_dataset_splits_all_of_its_windows(data):
    dataset = read(data)
    every = [window.id for window in dataset.windows()]
    parts = {split: [window.id for window in dataset.windows(split)] for split in ("train", "validation", "test")}
    assert {split: len(ids) for split, ids in parts.items()} == {"train": 6, "validation": 3, "test": 3} == dataset.survey().windows
    assert sorted(sum(parts.values(), [])) == sorted(every) and len(set(every)) == 12
    assert all(dataset.side_of(window) == "test" for window in dataset.windows("test"))
    assert [it.id for it in dataset.recordings("test")] == ["/".join(parts["test"][0].split("/")[1:3])]
    assert dataset.home("marble") is dataset.homes[0]


def test_a_path_may_begin_at_home(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert len(read(f"marble:~/{tmp_path.name}").index) == 4


def test_a_dataset_reads_events_anew_each_time(data, tmp_path):
    dataset = read(data)
    assert len(list(dataset.windows())) == len(list(dataset.windows())) == 12
    (tmp_path / "A1m/instance4/environmental.csv").unlink()  # so nothing was kept, and earlier recordings are still read
    found = dataset.windows()
    assert next(found).recording == "A1m/instance1"
    with pytest.raises(UserError, match="instance4/environmental.csv cannot be read"):
        list(found)


def test_window_size_and_seed_are_options(data):
    assert [len(window.events) for window in read(data, window=24).windows()] == [24] * 4
    sides = {tuple(it.id for it in read(data, split_seed=seed).recordings("test")) for seed in range(8)}
    assert len(sides) > 1
    assert read(data, ReadOptions(window=5), window=12).options == ReadOptions(window=12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch:PATH", "unknown data 'nosuch:PATH'.*one of simulated, marble:PATH"),
        ("", "READER:PATH, one of simulated, marble:PATH"),
        ("/some/folder", "READER:PATH, one of simulated, marble:PATH"),
        ("marble", "names no folder: write marble:PATH"),
        ("marble:", "names no folder: write marble:PATH"),
        ("marble:~no such user/x", "there is no folder ~no such user/x"),
        ("marble:/nowhere:at all", "there is no folder /nowhere:at all"),
        (f"marble:{__file__}", "there is no folder"),
    ],
)
def test_a_wrong_name_is_told_in_one_sentence(name, message):
    with pytest.raises(UserError, match=message) as caught:
        read(name)
    assert "\n" not in str(caught.value)


def test_wrong_options_and_names_within_a_dataset_are_told(data):
    for options in ({"transition": "maybe"}, {"utc_offset": 24}, {"utc_offset": float("nan")}, {"window": 0}):
        with pytest.raises(UserError):
            read(data, **options)
    dataset = read(data)
    for call in (lambda: dataset.windows("dev"), lambda: dataset.recordings(""), lambda: dataset.home("x"), lambda: dataset.side_of(a_recording(1))):
        with pytest.raises(UserError):
            call()
