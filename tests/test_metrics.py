"""Scores against counts by hand and against scikit-learn."""

import json
import random

import pytest

from harkd.scoring.metrics import score


def test_by_hand():
    truth = ["A", ("A",), "A", "B", "B", "C", (), None, ("A", "B")]
    predictions = ["A", "A", "B", "B", None, "A", "A", None, "B"]
    scores = score(truth, predictions, ["C", "B", "A", "D"])
    assert scores.labels == ("C", "B", "A", "D")
    assert (scores.events, scores.scored, scores.correct, scores.missing) == (9, 6, 3, 1)
    assert scores.confusion == (  # C, B, A, D, no valid answer
        (0, 0, 1, 0, 0),
        (0, 1, 0, 0, 1),
        (0, 1, 2, 0, 0),
        (0, 0, 0, 0, 0),
    )
    assert scores.accuracy == 3 / 6
    assert scores.accuracy_of_all == 3 / 9
    a, b = scores.per_label["A"], scores.per_label["B"]
    assert (a.precision, a.recall, a.support) == (2 / 3, 2 / 3, 3)
    assert a.f1 == pytest.approx(2 / 3)
    assert (b.precision, b.recall, b.f1, b.support) == (1 / 2, 1 / 2, 1 / 2, 2)
    assert (scores.per_label["D"].f1, scores.per_label["D"].support) == (0, 0)
    assert scores.weighted_f1 == pytest.approx((3 * 2 / 3 + 2 * 1 / 2) / 6)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)  # D has no support


def test_several_labels():
    truth = [("A", "B"), ("B", "C"), ("B", "A"), ("C", "A"), "A"]
    several = score(truth, ["A", "B", None, "B", "B"], ["C", "A", "B"]).several
    assert (several.events, several.any_of_accuracy) == (4, 2 / 4)
    assert (several.best_constant, several.best_constant_label) == (3 / 4, "A")  # B does as well, but A is offered first


def test_what_is_not_on_offer():
    truth = ["A", "TRANSITION", ("A", "TRANSITION"), ("B", "B")]
    scores = score(truth, ["TRANSITION", "A", "A", "B"], ["A", "B"])
    assert (scores.events, scores.scored, scores.several.events) == (4, 3, 0)
    assert scores.confusion == ((1, 0, 1), (0, 1, 0))  # a prediction that is not on offer is no valid answer
    assert (scores.correct, scores.missing) == (2, 1)


def test_labels_by_default_are_all_that_occur():
    assert score(["B", ("A", "D"), ()], ["C", None, "B"]).labels == ("A", "B", "C", "D")


def test_over_no_events_a_figure_is_none():
    for truth, predictions, labels in (([], [], None), ([], [], ["A"]), ([(), None], ["A", None], ["A"]), (["X"], ["A"], ["A"])):
        scores = score(truth, predictions, labels)
        assert (scores.accuracy, scores.weighted_f1, scores.macro_f1, scores.several.any_of_accuracy) == (None,) * 4
        assert (scores.several.best_constant, scores.several.best_constant_label) == (None, None)
        assert scores.accuracy_of_all == (0 if truth else None)
        assert scores.scored == scores.missing == 0
    all_missing = score(["A", "B"], [None, None])
    assert (all_missing.accuracy, all_missing.weighted_f1, all_missing.macro_f1, all_missing.missing) == (0, 0, 0, 2)


@pytest.mark.parametrize("predictions", [[], ["A"], ["A", "A", "A"]])
def test_one_prediction_for_each_event(predictions):
    with pytest.raises(ValueError, match="2 events"):
        score(["A", "B"], predictions)


def test_json():
    scores = score(["Ä", "B", ("Ä", "B")], ["Ä", None, "B"], ["B", "Ä"])
    plain = scores.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert json.dumps(plain) == json.dumps(score(["Ä", "B", ("Ä", "B")], ["Ä", None, "B"], ["B", "Ä"]).to_dict())
    assert plain["confusion"] == {"rows": ["B", "Ä"], "columns": ["B", "Ä", None], "counts": [[0, 0, 1], [0, 1, 0]]}
    assert plain["per_label"]["Ä"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert plain["several"]["any_of_accuracy"] == 1.0
    assert plain["accuracy"] == 0.5


def random_case(rng):
    labels = rng.sample(["COOKING", "EATING", "b c", "D", "é", "F", "watching TV"], rng.randrange(1, 8))
    occurring = labels[: rng.randrange(1, len(labels) + 1)]
    truth = [rng.choice(occurring) for _ in range(rng.randrange(1, 60))]
    predictions = [true if rng.random() < 0.4 else rng.choice([*labels, None, None]) for true in truth]
    return labels, truth, predictions


def test_equal_to_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    for _ in range(300):
        labels, truth, predictions = random_case(rng)
        scores = score(truth, predictions, labels)
        peers = [label if label is not None else "<no answer>" for label in predictions]
        per_label = [[s.precision, s.recall, s.f1, s.support] for s in scores.per_label.values()]
        expected = metrics.precision_recall_fscore_support(truth, peers, labels=labels, zero_division=0)
        assert [list(column) for column in zip(*per_label)] == [pytest.approx(column) for column in expected]
        supported = sorted(set(truth))
        for average, figure in (("weighted", scores.weighted_f1), ("macro", scores.macro_f1)):
            assert figure == pytest.approx(metrics.f1_score(truth, peers, labels=supported, average=average, zero_division=0))
        assert scores.accuracy == pytest.approx(metrics.accuracy_score(truth, peers))
        matrix = metrics.confusion_matrix(truth, peers, labels=[*labels, "<no answer>"])
        assert [list(row) for row in scores.confusion] == matrix[:-1].tolist()
        assert scores.missing == matrix[:, -1].sum()


def test_support_never_depends_on_predictions():
    rng = random.Random(1)
    for _ in range(50):
        labels, truth, predictions = random_case(rng)
        truth = [rng.choice([true, (), (true, "x"), (*labels[:2],)]) for true in truth]
        supports = [
            {label: figures.support for label, figures in score(truth, answers, labels).per_label.items()}
            for answers in (predictions, [None] * len(truth), [labels[0]] * len(truth))
        ]
        assert supports[0] == supports[1] == supports[2]
