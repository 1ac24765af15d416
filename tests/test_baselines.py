"""The baselines on hand-made windows; naive Bayes against scikit-learn."""

import random
from dataclasses import replace
from datetime import datetime

import pytest

from harkd.errors import UserError
from harkd.homes.events import Event, Window
from harkd.scoring import sequence_baselines
from harkd.scoring.baselines import BASELINES, Majority, NaiveBayes, SensorLookup, answers, baseline

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
    assert [baseline(name).__name__ for name in BASELINES[2:]] == ["NaiveBayes", "Hmm", "RecordingHmm", "BiGru"]
    with pytest.raises(UserError, match="'naive': choose one of majority, sensor"):
        baseline("naive")


@pytest.mark.parametrize("windows", [[], [window()], [window(("kitchen", "stove", ()))]])
@pytest.mark.parametrize("name", BASELINES)
def test_nothing_to_learn_is_a_users_mistake(name, windows):
    with pytest.raises(UserError, match="no labelled event"):
        baseline(name).fit(windows, LABELS)


@pytest.mark.parametrize("name", BASELINES)
def test_a_training_label_that_is_not_on_offer_is_refused(name):
    with pytest.raises(ValueError):
        baseline(name).fit(TRAIN, ("EATING", "COOKING"))


@pytest.mark.parametrize("name", BASELINES)
def test_a_label_that_training_never_showed_is_never_given(name, monkeypatch):
    monkeypatch.setattr(sequence_baselines, "FEWEST", 10)
    fitted = baseline(name).fit(TRAIN[:1], ("TV", *LABELS[:2]))
    assert set(fitted.predict(TEST)) <= {"EATING", "COOKING"} and len(fitted.predict(TEST)) == 6


# naive Bayes


def random_windows(rng, n):
    """Windows of up to ten events, of which some have no label and some two."""
    made = []
    for number in range(n):
        events = []
        for i in range(rng.randrange(1, 11)):
            sensor, room, state = rng.choice(["stove", "chair", "door"]), rng.choice(["kitchen", "hall"]), rng.choice(["on", "off"])
            labels = rng.choice([(), ("TV",), ("EATING",), ("COOKING",), ("TV", "EATING"), ("COOKING",) if sensor == "stove" else ("TV",)])
            events.append(Event(i, datetime(2020, 1, 1, rng.randrange(6, 12), i), sensor, room, state, labels))
        made.append(Window(f"h/r{number // 4}/{number:04}", "h", "g", f"r{number // 4}", tuple(events)))
    return made


def test_naive_bayes_equals_scikit_learn():
    peers = pytest.importorskip("sklearn.naive_bayes")
    rng = random.Random(0)
    train, test = random_windows(rng, 30), random_windows(rng, 20)
    unscored = replace(train[0].events[0], sensor="gate", time=datetime(2020, 1, 1, 3), labels=())
    train.append(replace(train[0], events=(unscored, unscored)))  # shows values that count for nothing

    def features(window, i):
        own, around = window.events[i], (window.events[i - 1] if i else None, window.events[i + 1] if i + 1 < len(window.events) else None)
        return [f"{own.room}|{own.sensor}|{own.state}", own.time.hour, *(beside and f"{beside.room}|{beside.sensor}" for beside in around)]

    rows = [(features(window, i), label) for window in train for i, event in enumerate(window.events) for label in event.labels]
    codes = [{value: code for code, value in enumerate(dict.fromkeys(column))} for column in zip(*(row for row, _ in rows))]

    def coded(row):
        return [code.get(value, len(code)) for code, value in zip(codes, row)]

    peer = peers.CategoricalNB(alpha=1, min_categories=[len(code) + 1 for code in codes])
    peer.fit([coded(row) for row, _ in rows], [LABELS.index(label) for _, label in rows])
    fitted = NaiveBayes.fit(iter(train), LABELS)
    strangers = [replace(window, events=tuple(replace(event, room="cellar") for event in window.events)) for window in test]
    for window in (*test, *strangers):
        expected = peer.predict_proba([coded(features(window, i)) for i in range(len(window.events))])
        assert fitted.posterior(window) == pytest.approx(expected)
        assert fitted.predict(window) == [LABELS[i] for i in expected.argmax(axis=1)]


# through the door


def test_windows_are_answered_one_by_one_or_a_recording_at_a_time():
    class Counts:
        def __init__(self, whole):
            self.whole, self.asked = whole, []

        def predict(self, window):
            self.asked.append(len(window.events))
            return [f"{window.recording} {i}" for i in range(len(window.events))]

    windows = [replace(window, recording=name) for name, window in zip("aabb", [*TRAIN, TEST])]  # 3, 3, 2 and 6 events
    for whole, asked in ((False, [3, 3, 2, 6]), (True, [6, 8])):
        fitted = Counts(whole)
        found = list(answers(fitted, iter(windows)))
        assert [window for window, _ in found] == windows and fitted.asked == asked
        assert found[1][1] == [f"a {i + 3 * whole}" for i in range(3)]
        assert found[3][1] == [f"b {i + 2 * whole}" for i in range(6)]
