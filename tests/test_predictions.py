"""Scores of records made by hand: the strict figure, the one with labels normalised, and the calibration of guided answers."""

import json
from functools import partial
from itertools import permutations

import pytest

from harkd.homes.answer import canonical
from harkd.recognition import reread
from harkd.scoring.predictions import costs, score_records

LABELS = ("COOKING", "EATING")


def record(answer, truth, group="g", **more):
    return {"group": group, "truth": [[label] if label else [] for label in truth], "answer": answer, "causes": {}, "seconds": 1.0, **more}


def test_normalised_labels_are_scored_apart():
    misspelt = record([None, "EATING"], ["COOKING", "EATING"], text=canonical(["Cooking", "EATING"]), finish_reason="stop", causes={"label_spelling": 1})
    cut = record([None], ["COOKING"], text=canonical(["COOKING"]), finish_reason="length", causes={"length": 1})
    baseline = record(["EATING"], ["EATING"])
    scores, confusions = score_records([misspelt, cut, baseline], LABELS, [("g", ["EATING"])], partial(reread, labels=LABELS))
    assert (scores["accuracy"], scores["missing"]) == (2 / 5, 3)
    assert (scores["normalised"]["accuracy"], scores["normalised"]["missing"]) == (3 / 5, 2)
    assert set(scores["normalised"]) == {"weighted_f1", "macro_f1", "accuracy", "missing"}
    assert scores["causes"] == {"dropped": 1, "label_spelling": 1, "length": 1} and confusions.shape == (1, 2, 3)


def test_calibration_of_the_answers_that_were_given_a_probability():
    guided = [
        record(["COOKING", "EATING"], ["COOKING", "COOKING"], probabilities=[{"COOKING": 0.9, "EATING": 0.1}, {"COOKING": 0.25, "EATING": 0.75}]),
        record(["COOKING", "COOKING"], ["COOKING", None], "h", probabilities=[{"COOKING": 1.0000001, "EATING": 0.0}, {"COOKING": 0.6, "EATING": 0.4}]),
    ]
    scores, _ = score_records(guided, LABELS, [], partial(reread, labels=LABELS))
    found = scores["calibration"]
    assert found["events"] == 3  # the unscored one tells nothing
    assert found["ece"] == pytest.approx((1 * 0.75 + 2 * 0.05) / 3)  # 0.75 is wrong; 0.9 and 1, in bins of their own, are right
    assert [(bin["events"], bin["accuracy"]) for bin in found["curve"]] == [(1, 0.0), (1, 1.0), (1, 1.0)]
    json.dumps(scores, allow_nan=False)


def test_without_probabilities_there_is_no_calibration():
    scores, _ = score_records([record(["COOKING"], ["COOKING"])], LABELS, [], partial(reread, labels=LABELS))
    assert scores["calibration"] is None
    partly, _ = score_records([record([None, "COOKING"], ["COOKING"] * 2, probabilities=[{}, {"COOKING": 0.5}])], LABELS, [], partial(reread, labels=LABELS))
    assert partly["calibration"]["events"] == 1 and partly["calibration"]["ece"] == 0.5


def test_groups_are_in_order_whatever_the_order_of_records():
    a, b = record(["COOKING"], ["COOKING"], "a"), record(["EATING"], ["COOKING"], "b")
    (one, first), (two, second) = (score_records(records, LABELS, [], partial(reread, labels=LABELS)) for records in ([a, b], [b, a]))
    assert one == two and (first == second).all() and one["groups"] == 2


def test_calibration_is_the_same_to_the_last_bit_whatever_the_order_of_records():
    of = [0.91, 0.92, 0.93, 0.97, 0.99, 0.935]
    guided = [record(["COOKING"], ["COOKING"], probabilities=[{"COOKING": p}]) for p in of]
    found = [score_records(records, LABELS, [], partial(reread, labels=LABELS))[0]["calibration"] for records in permutations(guided)]
    assert all(each == found[0] for each in found)


def test_costs_per_window():
    found = costs([record([], [], tokens={"prompt": 10, "completion": 4}), record([], [])])
    assert (found["windows"], found["seconds"], found["seconds_per_window"], found["prompt_tokens"], found["completion_tokens_per_window"]) == (2, 2, 1, 10, 2)


def test_each_home_is_read_with_its_own_labels(tmp_path):
    """What is written as "eating" is a misspelt EATING where a home offers that, and right as it is where it offers "eating", whatever other homes call it."""
    text, labels = canonical(["eating"]), {"a": ("EATING",), "b": ("eating",)}
    records = [
        {**record([None if home == "a" else "eating"], [name], group=home), "home": home, "text": text, "finish_reason": "stop"}
        for home, (name,) in labels.items()
    ]
    scores, _ = score_records(records, ("EATING", "eating"), [], lambda one: reread(one, labels[one["home"]]))
    assert scores["accuracy"] == 0.5 and scores["normalised"]["accuracy"] == 1.0
