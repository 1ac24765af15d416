"""Bootstrap intervals against a slow version and known distributions; calibration against scikit-learn."""

import random

import numpy as np
import pytest

from harkd.scoring import intervals as module
from harkd.scoring.calibration import calibration
from harkd.scoring.intervals import intervals, paired_differences
from harkd.scoring.metrics import FIGURES, score

LABELS = ("A", "B", "C", "D")  # D never occurs


def groups(rng: random.Random, n: int, skill: float = 0.6) -> list[tuple[list[str], list[str | None]]]:
    """(truth, predictions) of each group; some are easy, some hard, and sizes differ."""
    made = []
    for _ in range(n):
        right, truth = min(1, max(0, rng.gauss(skill, 0.2))), [rng.choice("AAAB" if rng.random() < 0.8 else "C") for _ in range(rng.randrange(3, 30))]
        made.append((truth, [true if rng.random() < right else rng.choice([*LABELS, None]) for true in truth]))
    return made


def confusions(made) -> np.ndarray:
    return np.array([score(*group, LABELS).confusion for group in made])


def slow_figures(made, seed: int, draws: int) -> list[list[float]]:
    """The same draws, every event scored again."""
    rng, n, figures = np.random.default_rng(seed), len(made), []
    for counts in rng.multinomial(n, [1 / n] * n, size=draws):
        drawn = [group for group, count in zip(made, counts) for _ in range(count)]
        scores = score([true for truth, _ in drawn for true in truth], [said for _, answers in drawn for said in answers], LABELS)
        figures.append([getattr(scores, name) for name in FIGURES])
    return figures


def test_equal_to_scoring_every_draw_anew(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 150)
    own, other = groups(random.Random(1), 9), groups(random.Random(1), 9)
    other = [(truth, ["A"] * len(truth)) for truth, _ in other]
    slow, against = np.array(slow_figures(own, 5, 150)), np.array(slow_figures(other, 5, 150))
    found, paired = intervals(confusions(own), 5), paired_differences(confusions(own), confusions(other), 5)
    for i, name in enumerate(FIGURES):
        assert found[name] == pytest.approx(np.percentile(slow[:, i], [2.5, 97.5])) and found[name][0] < found[name][1]
        assert paired[name]["interval"] == pytest.approx(np.percentile(slow[:, i] - against[:, i], [2.5, 97.5]))
        whole = [score(sum((t for t, _ in made), []), sum((p for _, p in made), []), LABELS) for made in (own, other)]
        assert paired[name]["difference"] == pytest.approx(getattr(whole[0], name) - getattr(whole[1], name))


def test_seeded():
    made = confusions(groups(random.Random(2), 10))
    assert intervals(made) == intervals(made) == intervals(made, 0) != intervals(made, 1)


def binary(right: np.ndarray, events: int) -> np.ndarray:
    """Confusions [G, 1, 2] of groups of one label, `right` [G] of whose events are found."""
    return np.stack([right, events - right], axis=1)[:, None]


def test_the_accuracy_of_equal_groups_spreads_as_their_mean():
    """Its standard error is std / sqrt(G), and its distribution close to normal."""
    right = np.random.default_rng(0).integers(0, 51, 100)
    low, high = intervals(binary(right, 50))["accuracy"]
    half = 1.96 * right.std() / 50 / 10
    assert (low + high) / 2 == pytest.approx(right.mean() / 50, abs=0.1 * half) and (high - low) / 2 == pytest.approx(half, rel=0.07)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Groups whose accuracy is drawn from a beta distribution around 0.7, 300 data sets of 40 groups."""
    rng, covered, naive = np.random.default_rng(1), 0, 0
    for _ in range(300):
        right = rng.binomial(20, rng.beta(3.5, 1.5, 40))
        low, high = intervals(binary(right, 20))["accuracy"]
        covered += low <= 0.7 <= high
        naive += abs(right.mean() / 20 - 0.7) < 1.96 * (0.21 / 800) ** 0.5  # as if events did not resemble each other
    assert 0.90 <= covered / 300 <= 0.98 and naive / 300 < 0.8


def test_what_is_hard_for_both_models_is_left_out_of_their_difference():
    right = np.random.default_rng(2).integers(5, 50, 30)
    own, other = binary(right, 50), binary(right - 5, 50)
    low, high = intervals(own)["accuracy"]
    found = paired_differences(own, other)["accuracy"]
    assert high - low > 0.1 and found == {"difference": pytest.approx(0.1), "interval": pytest.approx([0.1, 0.1])}


def test_no_interval_from_fewer_than_eight_groups():
    made = confusions(groups(random.Random(3), 8))
    nothing = np.zeros_like(made[:1])
    assert intervals(made) is not None and intervals(made[:7]) is None and intervals(np.concatenate([made[:7], nothing])) is None
    found = paired_differences(made[:7], made[:7])
    assert found == {name: {"difference": 0, "interval": None} for name in FIGURES}
    assert paired_differences(nothing, nothing) is None
    widened = [intervals(np.concatenate(parts)) for parts in ([made, nothing], [nothing, made])]
    assert widened == [intervals(made)] * 2  # a group without a scored event changes nothing


def test_models_that_were_scored_on_other_events_are_not_compared():
    made = confusions(groups(random.Random(4), 8))
    for other in (made[:7], made[::-1]):
        with pytest.raises(ValueError, match="same events"):
            paired_differences(made, other)


# calibration


def test_calibration_equals_scikit_learn():
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(0)
    for events in (1, 7, 500):
        p = np.concatenate([rng.random(events), [0, 0.1, 0.5, 1]])
        right = rng.random(len(p)) < p**2
        found = calibration(p, right)
        accuracy, mean = curve(right, p, n_bins=10)
        assert [b.accuracy for b in found.curve] == pytest.approx(accuracy) and [b.probability for b in found.curve] == pytest.approx(mean)
        of = np.maximum(np.ceil(p * 10), 1)
        ece = sum(abs(right[of == b].sum() - p[of == b].sum()) for b in range(1, 11)) / len(p)
        assert found.ece == pytest.approx(ece) and found.events == len(p) == sum(b.events for b in found.curve)


def test_calibration_of_known_probabilities():
    rng = np.random.default_rng(1)
    p = rng.random(50_000)
    assert calibration(p, rng.random(50_000) < p).ece < 0.01
    assert calibration(p, rng.random(50_000) < p / 2).ece == pytest.approx(0.25, abs=0.01)  # the mean of p / 2
    assert calibration([0.75] * 4, [True, True, True, False]).ece == 0
    assert calibration([1.0] * 4, [True, False, False, False]).ece == 0.75
    assert (calibration([], []).ece, calibration([], []).curve) == (None, ())


@pytest.mark.parametrize(("p", "right"), [([0.5], []), ([1.1], [True]), ([float("nan")], [True]), ([-0.1], [False])])
def test_calibration_refuses_what_is_no_probability(p, right):
    with pytest.raises(ValueError, match="probability"):
        calibration(p, right)
