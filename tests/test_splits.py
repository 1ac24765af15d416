"""Splits by subject, scenario, home and days, and folds: who may be on which side, counted from the recordings themselves."""

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from harkd.errors import UserError
from harkd.homes.__main__ import main as homes
from harkd.homes.dataset import Dataset, read
from harkd.homes.events import Event, Home, Recording
from harkd.homes.splits import sides
from tests.door_cases import outcome
from tests.marble_files import recording


def a_recording(id: str, residents: str = "", home: str = "h", day: int = 0, scenario: str = "", events: int = 1) -> Recording:
    made = [Event(n, datetime(2024, 1, 1) + timedelta(days=day, seconds=n), "s", "r", "on") for n in range(events)]
    return Recording(id, Home(home, (), ()), f"{home}/{id}", tuple(residents), lambda: iter(made), scenario=scenario)


DAYS = [a_recording(f"d{n}", day=n) for n in range(20)]
PEOPLE = [a_recording(f"{who}{n}", who) for n, who in enumerate(["a", "b", "c", "d", "e", "ab", "cd", "de", "abcde"])]


def test_no_person_is_on_two_sides_and_mixed_recordings_are_left_out():
    for seed in range(10):
        for k, fold in ((0, 0), (5, 1), (5, 4)):
            chosen = sides(PEOPLE, "subject", seed, k, fold)
            people = {side: {who for it, its in zip(PEOPLE, chosen) if its == side for who in it.residents} for side in ("train", "validation", "test")}
            assert not any(people[one] & people[other] for one in people for other in people if one != other)
            assert len(people["test"]) == 1 and chosen[-1] is None  # who all were there
            for it, side in zip(PEOPLE[:5], chosen):
                assert side is not None, it.id
    pooled = [sides(PEOPLE, "subject", 0, 5, fold) for fold in range(1, 6)]
    assert all(sum(chosen[i] == "test" for chosen in pooled) == 1 for i in range(5))  # each person alone, once


def test_a_namesake_in_another_home_is_another_person():
    two = [a_recording("x", "1", "A"), a_recording("y", "1", "B")]
    assert sorted(sides(two, "subject")) == ["test", "train"]


def test_scenarios_and_homes_stand_on_one_side():
    index = [a_recording(f"{s}{n}", "p", home=f"home{n % 3}", scenario=s) for n in range(9) for s in "ABCDE"]
    for by, of in (("scenario", lambda it: it.scenario), ("home", lambda it: it.home.name)):
        chosen = sides(index, by)
        assert len({(of(it), side) for it, side in zip(index, chosen)}) == len({of(it) for it in index}) and set(chosen) == {"train", "validation", "test"}


def test_a_persons_day_is_on_one_side_whatever_its_scenarios():
    """Nine couples play two or three of five scenarios on their day; what tests is all of its scenarios, and none of it trains."""
    index = [replace(a_recording(f"{n}{s}", f"{n}", scenario=s), group=f"{n}") for n in range(9) for s in ("AB", "CD", "BC", "E", "ADE")[n % 5]]
    assert len({side for side in sides(index, "scenario")} - {None}) == 3
    for seed in range(10):
        for k, fold in ((0, 0), (5, 1), (5, 4)):
            chosen = sides(index, "scenario", seed, k, fold)
            of_group = {it.group: {side for one, side in zip(index, chosen) if one.group == it.group} - {None} for it in index}
            assert all(len(found) == 1 for found in of_group.values())
            scenarios = {side: {it.scenario for it, its in zip(index, chosen) if its == side} for side in ("train", "validation", "test")}
            assert not any(scenarios[one] & scenarios[other] for one in scenarios for other in scenarios if one != other)
            assert all(side == "test" for it, side in zip(index, chosen) if it.scenario in scenarios["test"])
            out = [it for it, side in zip(index, chosen) if side is None]
            assert out and all(of_group[it.group] <= {"test", "validation"} for it in out)
    pooled = [sides(index, "scenario", 0, 5, fold) for fold in range(1, 6)]
    assert all([chosen[i] for chosen in pooled].count("test") == 1 for i in range(len(index)))


@pytest.mark.parametrize("order", [1, -1])
def test_later_days_test_with_a_gap_of_one(order):
    chosen = sides(DAYS[::order], "days")[::order]
    assert chosen == ["train"] * 12 + [None] + ["validation"] * 2 + [None] + ["test"] * 4
    other = [a_recording(f"d{n}", home="other", day=100 + n) for n in range(5)]  # each home has its own last days
    assert sides([*DAYS, *other], "days")[20:] == ["train", None, "validation", None, "test"]


def test_groups_of_one_day_stand_on_one_side_and_the_gap_is_a_whole_day():
    several = [a_recording(f"d{n}{who}", day=n) for n in range(20) for who in "abc"]
    assert sides(several, "days") == [side for side in sides(DAYS, "days") for _ in "abc"]
    assert sides(several, "days", 0, 4, 2) == [side for side in sides(DAYS, "days", 0, 4, 2) for _ in "abc"]
    joined = [replace(it, group=several[0].group) for it in several[:3]] + [replace(several[3], group=several[0].group), *several[4:]]
    assert sides(joined, "days")[:4] == ["train"] * 4  # a group of two days is of the first


def test_folds_of_days_are_stretches_and_test_every_day_once():
    tested = Counter()
    for fold in range(1, 5):
        chosen = sides(DAYS, "days", 0, 4, fold)
        test = [n for n, side in enumerate(chosen) if side == "test"]
        assert test == list(range(5 * (fold - 1), 5 * fold)) and "validation" not in chosen
        assert [n for n, side in enumerate(chosen) if side is None] == [n for n in (test[0] - 1, test[-1] + 1) if 0 <= n < 20]
        tested.update(test)
    assert tested == Counter(range(20))
    assert Counter(sides(DAYS, "days", 0, 4)) == {f"fold {n}": 5 for n in range(1, 5)}


@pytest.mark.parametrize(
    ("index", "arguments", "message"),
    [
        (DAYS, ("subject",), "nothing tells the subject of recording 'd0'"),
        (DAYS, ("scenario",), "nothing tells the scenario"),
        (DAYS, ("home",), "--split-by home leaves no recording to test"),
        (DAYS[:4], ("days",), "h has 4 days, too few for 3 sides"),
        (DAYS[:5], ("days", 0, 6, 1), "h has 5 days, too few for 6 sides"),
        ([a_recording("x", "ab"), a_recording("y", "ab")], ("subject",), "leaves no recording to train"),
        (DAYS, ("group", 0, 21, 1), "20 groups cannot be divided into 21 folds"),
    ],
)
def test_what_cannot_be_divided_is_told(index, arguments, message):
    with pytest.raises(UserError, match=message):
        sides(index, *arguments)


def test_a_dataset_in_folds_covers_each_window_once_out_of_fold():
    dataset = read("simulated:D1", folds=7)
    every, tested = [window.id for window in dataset.windows()], []
    for part in dataset.folded():
        train, test = ({window.id for window in part.windows(split)} for split in ("train", "test"))
        assert not train & test and len(train) + len(test) == len(every)
        tested += test
    assert sorted(tested) == sorted(every)
    (chosen,) = read("simulated:D1", folds=7, fold=3).folded()
    assert {window.id for window in chosen.windows("test")} == {w.id for w in dataset.folded()[2].windows("test")}
    with pytest.raises(UserError, match="--folds 7 makes folds, none of which is test"):
        dataset.windows("test")
    for wrong in ({"folds": 1}, {"folds": -2}, {"fold": 1}, {"folds": 3, "fold": 4}, {"split_by": "luck"}):
        with pytest.raises(UserError):
            read("simulated:D1", **wrong)


def test_the_homes_door_shows_what_is_on_which_side(tmp_path):
    for day, who in enumerate(["a", "b", "c", "ab", "bc"]):
        recording(tmp_path, f"A{day % 2}m/instance{day + 1}", who, 12, day)
    code, result, text, _ = outcome(homes, f"marble:{tmp_path}", "--split-by", "subject")
    assert code == 0 and result["windows"] == {"train": 2, "validation": 2, "test": 2, "left out": 4}
    assert "recordings  5 in 5 groups, 2 left out by --split-by subject" in text.splitlines()
    assert outcome(homes, f"marble:{tmp_path}", "--split-by", "scenario")[1]["windows"] == {"train": 6, "validation": 0, "test": 4}
    code, result, text, _ = outcome(homes, f"marble:{tmp_path}", "--folds", "2")
    assert code == 0 and result["windows"] == {"fold 1": 6, "fold 2": 4} and "--- user ---" in text
    code, _, _, err = outcome(homes, f"marble:{tmp_path}", "--split-by", "home")
    assert code == 2 and "--split-by home leaves no recording to test" in err and err.count("\n") == 1
    recording(tmp_path, "A0m/instance9", "b", 4, 1)  # b's day 1 is in A1m too
    code, result, text, _ = outcome(homes, f"marble:{tmp_path}", "--split-by", "scenario")
    assert code == 0 and result["windows"]["left out"] == 1 and "1 left out by --split-by scenario" in text


def test_the_default_is_as_before():
    dataset = read("simulated:D2")
    assert isinstance(dataset, Dataset) and dataset.left_out == 0 and len(dataset.folded()) == 1
