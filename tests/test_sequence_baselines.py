"""The hidden Markov model against sums over all paths; the GRU: what it learns, and that it is the same each time."""

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import product

import numpy as np
import pytest
import torch

from harkd.homes.events import Event, Window
from harkd.scoring import sequence_baselines
from harkd.scoring.baselines import SensorLookup, answers, joined
from harkd.scoring.sequence_baselines import BiGru, Hmm, RecordingHmm, _inputs, _logits
from tests.helpers import ROOT
from tests.test_baselines import LABELS, TRAIN, random_windows

START = datetime(2021, 1, 1, 8)


def sequence(*shown: str, labels=(), recording="r", number=0):
    """A window of events at the sensors `shown`; labels are given by first letter, "." for none."""
    named = {label[0]: (label,) for label in LABELS} | {".": ()}
    pairs = enumerate(zip(shown, labels or "." * len(shown), strict=True))
    events = tuple(Event(i, START + timedelta(seconds=i), sensor, "", "on", named[label]) for i, (sensor, label) in pairs)
    return Window(f"h/{recording}/{number:04}", "h", "g", recording, events)


def test_importing_the_scores_needs_no_torch():
    code = "import sys, harkd.scoring.sequence_baselines, harkd.scoring.intervals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# the hidden Markov model


def by_paths(train, window) -> np.ndarray:
    """P(label of event n | window): counts by hand, then the sum over every path of labels through the window."""
    start, after, shows, known = Counter(), Counter(), Counter(), set()
    for one in train:
        start.update(one.events[0].labels)
        for event in one.events:
            shows.update((label, event.description) for label in event.labels)
            known |= {event.description} if event.labels else set()
        for event, following in zip(one.events, one.events[1:]):
            after.update(product(event.labels, following.labels))
    total, left = Counter(), Counter()
    for (label, _), n in shows.items():
        total[label] += n
    for (label, _), n in after.items():
        left[label] += n
    found = np.zeros((len(window.events), len(LABELS)))
    for path in product(range(len(LABELS)), repeat=len(window.events)):
        names = [LABELS[i] for i in path]
        p = (start[names[0]] + 1) / (start.total() + len(LABELS))
        for before, label in zip(names, names[1:]):
            p *= (after[before, label] + 1) / (left[before] + len(LABELS))
        for event, label in zip(window.events, names):
            p *= (shows[label, event.description] + 1) / (total[label] + len(known) + 1)
        found[range(len(path)), path] += p
    return found / found.sum(axis=1, keepdims=True)


def test_the_hmm_equals_the_sum_over_all_paths():
    rng = random.Random(0)
    train, test = random_windows(rng, 25), random_windows(rng, 12)
    fitted = Hmm.fit(iter(train), LABELS)
    for window in test:
        window = replace(window, events=(*window.events[:5], replace(window.events[0], sensor="never seen")))
        expected = by_paths(train, window)
        assert fitted.posterior(window) == pytest.approx(expected)
        assert fitted.predict(window) == [LABELS[i] for i in expected.argmax(axis=1)]


def test_the_hmm_learns_from_order():
    """A door says nothing, but what came before and what comes after do."""
    train = [sequence("stove", "door", "stove", labels="CCC"), sequence("sofa", "door", "sofa", labels="TTT")] * 5
    fitted = Hmm.fit(train, LABELS)
    assert fitted.predict(sequence("stove", "door")) == ["COOKING"] * 2 and fitted.predict(sequence("door", "sofa")) == ["TV"] * 2


def test_events_without_a_label_are_masked():
    """Whatever they show, and what lies on either side of them are no neighbours."""
    gap, other = (sequence("stove", middle, "sofa", labels="C.T") for middle in ("door", "window"))
    apart = [sequence("stove", labels="C"), sequence("sofa", labels="T")]
    first, second, third = (Hmm.fit(train, LABELS) for train in ([gap] * 3, [other] * 3, apart * 3))
    assert first.places == second.places and (first.transition == 1 / 2).all()
    assert (first.emission == second.emission).all() and (first.emission == third.emission).all()


def test_over_whole_recordings_the_hmm_learns_from_and_sees_what_came_before():
    """What the first window of a recording shows decides the second one, in which only doors open."""
    train = [sequence(first, "door", labels=label * 2, recording=f"{label}{n}") for n in range(9) for first, label in (("stove", "C"), ("sofa", "T"))]
    later = [sequence("door", "door", labels=label * 2, recording=f"{label}{n}", number=1) for n in range(9) for label in "CT"]
    train = [window for pair in zip(train, later) for window in pair]
    test = [sequence("stove", "door", recording="a"), sequence("door", "door", recording="a", number=1), sequence("sofa", "door", recording="b"), sequence("door", "door", recording="b", number=1)]
    fitted = RecordingHmm.fit(iter(train), LABELS)
    assert [labels for _, labels in answers(fitted, test)] == [["COOKING"] * 2, ["COOKING"] * 2, ["TV"] * 2, ["TV"] * 2]
    windowed = [labels for _, labels in answers(Hmm.fit(train, LABELS), test)]
    assert windowed[1] == windowed[3]  # which has no way to know
    by_hand = Hmm.fit([joined(train[i : i + 2]) for i in range(0, len(train), 2)], LABELS)
    assert (fitted.transition == by_hand.transition).all() and (fitted.start == by_hand.start).all()


def test_a_long_recording_neither_underflows_nor_drifts():
    rng = random.Random(1)
    fitted = Hmm.fit(random_windows(rng, 40), LABELS)
    long = joined(random_windows(rng, 4000))
    posterior = fitted.posterior(long)
    assert len(posterior) > 20_000 and np.isfinite(posterior).all() and posterior.sum(axis=1) == pytest.approx(1)
    middle = replace(long, events=long.events[9900:10100])  # the far past is forgotten
    assert fitted.posterior(middle)[100] == pytest.approx(posterior[10_000])


# the GRU


@pytest.fixture(scope="module")
def ordered():
    """The label of a whole window is told by whether the stove or the sofa comes first: no count of events can tell."""
    rng, made = random.Random(2), []
    for n in range(120):
        doors = [["door"] * rng.randrange(1, 4) for _ in range(3)]
        first, second = rng.sample(["stove", "sofa"], 2)
        shown = [*doors[0], first, *doors[1], second, *doors[2]]
        made.append(sequence(*shown, labels=("C" if first == "stove" else "T") * len(shown), number=n))
    return made


@pytest.fixture(scope="module")
def fitted(ordered):
    return BiGru.fit(ordered[:80], LABELS)


def accuracy(fitted, windows) -> float:
    pairs = [(event.labels[0], label) for window in windows for event, label in zip(window.events, fitted.predict(window))]
    return sum(true == said for true, said in pairs) / len(pairs)


def test_the_gru_sees_both_ways(ordered, fitted):
    assert accuracy(fitted, ordered[80:]) > 0.97  # the doors that come before both, too
    assert accuracy(SensorLookup.fit(ordered[:80], LABELS), ordered[80:]) < 0.7
    assert fitted.labels == ("COOKING", "TV")


def test_the_gru_is_the_same_each_time_and_leaves_torch_as_it_was(ordered, monkeypatch):
    monkeypatch.setattr(sequence_baselines, "FEWEST", 30)
    before, found = torch.get_num_threads(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.set_num_threads(seed)
        state = torch.get_rng_state()
        found.append(BiGru.fit(iter(ordered), LABELS).network.state_dict())
        assert torch.get_num_threads() == seed and torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(before)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_padding_changes_nothing(fitted, ordered):
    short, long = sorted(ordered, key=lambda window: len(window.events))[:: len(ordered) - 1]
    (a, times), (b, others) = (_inputs(window, fitted.places) for window in (short, long))
    with torch.no_grad():
        alone = _logits(fitted.network, a[None], times[None], torch.tensor([len(a)]))[0]
        pad = torch.nn.utils.rnn.pad_sequence
        both = _logits(fitted.network, pad([a, b], batch_first=True), pad([times, others], batch_first=True), torch.tensor([len(a), len(b)]))
    assert len(a) < len(b) and torch.allclose(both[0, : len(a)], alone, atol=1e-5)


def test_the_gru_masks_what_has_no_label_and_counts_several_once_for_each():
    """At the stove two labels are equally likely, whether two events say so or one."""
    train = [sequence("stove", labels="C"), sequence("stove", labels="E"), sequence("sofa", "chair", labels="T.")]
    both = replace(TRAIN[0], events=(replace(train[0].events[0], labels=("COOKING", "EATING")),))
    for windows in (train, [both, both, train[2]]):
        fitted = BiGru.fit(windows, LABELS)
        values, times = _inputs(sequence("stove"), fitted.places)
        with torch.no_grad():
            p = _logits(fitted.network, values[None], times[None], torch.tensor([1]))[0, 0].softmax(dim=0)
        assert p.tolist() == pytest.approx([0.5, 0.5, 0], abs=0.06)  # in the order of LABELS
        assert fitted.predict(sequence("sofa", "chair"))[0] == "TV"
