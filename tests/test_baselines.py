"""The baselines on hand-made windows."""

from datetime import datetime

import pytest

from harkd.errors import UserError
from harkd.homes.events import Event, Window
from harkd.scoring.baselines import Majority, SensorLookup, baseline

LABELS = ("EATING", "COOKING", "TV")


def window(*events):
    made = []
    for i, (room, sensor, labels) in enumerate(events):
        time = datetime(2020, 1, 1, 8, 0, i)
        made.append(Event(id=i, time=time, sensor=sensor, room=room, state="on" if i % 2 else "off", labels=labels))
    return Window(id="h/g/r/0000", home="h", group="g", recording="r", events=tuple(made))


TRAIN = [
    window(("kitchen", "stove", ("COOKING",)), ("kitchen", "stove", ("COOKING",)), ("kitchen", "stove", ("EATING",))),
    window(("dining room", "chair", ("EATING",)), ("office", "chair", ("TV",)), ("kitchen", "fridge", ())),
    window(("dining room", "chair", ("TV", "EATING")), ("living room", "couch", ("TV", "COOKING"))),
]
# EATING 3, COOKING 3, TV 3
TEST = window(
    ("kitchen", "stove", ()),
    ("dining room", "chair", ("TV",)),
    ("office", "chair", ()),
    ("living room", "couch", ()),
    ("kitchen", "fridge", ()),
    ("hall", "stove", ()),
)


def test_majority():
    assert Majority.fit(TRAIN, LABELS).predict(TEST) == ["EATING"] * 6  # a tie: first in the home's order
    assert Majority.fit(TRAIN, LABELS[::-1]).predict(TEST) == ["TV"] * 6
    assert Majority.fit(TRAIN[:1], LABELS).predict(TEST) == ["COOKING"] * 6
    assert Majority.fit(iter(TRAIN + [window(("hall", "door", ("TV",)))]), LABELS).predict(TEST) == ["TV"] * 6


def test_sensor_lookup():
    #       stove, dining chair, office chair, couch (tie), never labelled and unknown: the majority
    expected = ["COOKING", "EATING", "TV", "COOKING", "EATING", "EATING"]
    assert SensorLookup.fit(iter(TRAIN), LABELS).predict(TEST) == expected
    assert SensorLookup.fit(TRAIN, LABELS[::-1]).predict(TEST) == ["COOKING", "EATING", "TV", "TV", "TV", "TV"]


def test_the_order_of_windows_does_not_matter():
    assert SensorLookup.fit(TRAIN, LABELS) == SensorLookup.fit(TRAIN[::-1], LABELS)
    assert Majority.fit(TRAIN, LABELS) == Majority.fit(TRAIN[::-1], LABELS)


def test_by_name():
    assert baseline("majority") is Majority
    assert baseline("sensor") is SensorLookup
    with pytest.raises(UserError, match="'naive': choose one of majority, sensor"):
        baseline("naive")


@pytest.mark.parametrize("windows", [[], [window()], [window(("kitchen", "stove", ()))]])
@pytest.mark.parametrize("name", ["majority", "sensor"])
def test_nothing_to_learn_is_a_users_mistake(name, windows):
    with pytest.raises(UserError, match="no labelled event"):
        baseline(name).fit(windows, LABELS)


def test_a_training_label_that_is_not_on_offer_is_refused():
    with pytest.raises(ValueError):
        Majority.fit(TRAIN, ("EATING", "COOKING"))
