"""Simulated homes: the same on every machine, three families that share words and nothing else, and a task that sensors alone do not solve."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest

from harkd.distill.examples import true_answer
from harkd.errors import UserError
from harkd.homes.dataset import read
from harkd.homes.prompt import prompt, system_message, user_message
from harkd.homes.simulated import DAYS, DAYTIMES, house, reasoning
from harkd.homes.simulated_world import ACTIVITIES, MERGED, MOTION_NAMES, THINGS, first_word, plain
from harkd.scoring.baselines import SensorLookup
from harkd.scoring.metrics import score
from tests.helpers import ROOT

P = [house(f"P{number}") for number in range(200)]
D, T = ([house(f"{family}{number}") for number in range(30)] for family in "DT")


def parts(home):
    """Layout, sensor names and labels of a home."""
    rooms = tuple(room for room, _ in home.home.rooms)
    layout = (rooms, tuple(sorted(home.sensors)))
    names = frozenset(sensor for places in (*home.sensors.values(), home.motion.values()) for sensor in places)
    return layout, names, frozenset(home.home.label_names)


def words(home) -> set[str]:
    return set(re.findall(r"[^\W_]+|[^\w\s]", system_message(home.home)))


def test_families_share_words_and_no_home():
    known = {word for home in P for word in words(home)}
    seen = [{parts(home)[i] for home in P} for i in range(3)]
    for home in (*D, *T):
        assert words(home) - known <= {word for word in words(home) if word.isdigit()}, home.name
        assert not any(part in of_p for part, of_p in zip(parts(home), seen, strict=True)), home.name
    assert all(len(of_p) > 150 for of_p in seen), "P's homes differ from each other too"


def test_a_day_is_the_same_in_another_process():
    code = "import json; from harkd.homes.dataset import read\nprint(json.dumps([str(e) for r in read('simulated:D1').recordings() for e in r.events()][:400]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    here = [str(event) for recording in read("simulated:D1").recordings() for event in recording.events()]
    assert json.loads(done.stdout) == here[:400] and len(here) > 2000


@pytest.mark.parametrize("name", ["D0", "T2", "P5"])
def test_days_windows_and_labels(name):
    dataset = read(f"simulated:{name}")
    (home,) = dataset.homes
    assert len(dataset.index) == DAYS == len({recording.group for recording in dataset.index})
    times = [event.time for recording in dataset.index for event in recording.events()]
    assert times == sorted(times) and len({time.date() for time in times}) in (DAYS, DAYS + 1)  # who goes to bed late does so behind midnight
    counts = Counter(label for window in dataset.windows() for event in window.events for label in event.labels)
    assert set(counts) == set(home.label_names)
    unscored = sum(not event.labels for window in dataset.windows() for event in window.events)
    assert 0 < unscored < 0.3 * len(times)


def test_bare_simulated_is_d0():
    assert [window.events for window in read("simulated").windows("test")] == [window.events for window in read("simulated:D0").windows("test")]


@pytest.mark.parametrize("name", ["X1", "D", "D-1", "3", "D1x", "/tmp"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="there is no simulated home"):
        read(f"simulated:{name}")


def test_the_truth_is_in_no_prompt():
    for name in ("D2", "T1"):
        dataset = read(f"simulated:{name}")
        for window in dataset.windows("test"):
            system, user = (message["content"] for message in prompt(dataset.homes[0], window))
            assert not any(re.search(rf"\b{resident}\b", system + user) for resident in house(name).residents)
            assert window.recording not in system + user
            bare = replace(window, events=tuple(replace(event, labels=(), resident="") for event in window.events))
            assert user_message(bare) == user  # some labels are words of sensors: "reading", and a reading lamp


def test_the_example_is_of_no_recording():
    dataset = read("simulated:D0")
    example = user_message(next(dataset.windows()))
    for window in dataset.windows():
        shown = {(event.time.time(), event.description) for event in window.events}
        assert not {(event.time.time(), event.description) for event in dataset.homes[0].example} <= shown
    assert example.count('"event_id"') == 10


def test_every_activity_can_be_done_and_every_thing_is_used():
    used = {word.strip("+-?") for activity in ACTIVITIES.values() for script in activity.scripts for word in script.split()}
    assert used - {word for word in used if word.endswith("m") and word[:-1].isdigit()} == set(THINGS)
    assert all(activity.slots for name, activity in ACTIVITIES.items() if name != "enter")


def starts(home, activity):
    """Hours at which an activity's events happen, in the words of its home."""
    label = home.labels.get(activity)
    return [event.time.hour + event.time.minute / 60 for w in read(f"simulated:{home.name}").windows() for event in w.events if event.labels == (label,)]


def test_meals_are_told_apart_by_time_and_leaving_by_order():
    told = ("breakfast", "lunch", "dinner", "leave", "enter")
    home = next(home for home in D if "coats" in home.sensors and [plain(home.labels[activity]) for activity in told] == list(told))
    hours = [median(starts(home, meal)) for meal in ("breakfast", "lunch", "dinner")]
    assert hours[0] + 3 < hours[1] < hours[2] - 3
    door, coats = home.sensors["door"][0].name, home.sensors["coats"][0].name
    first: dict[str, Counter] = {"leave": Counter(), "enter": Counter()}
    for recording in read(f"simulated:{home.name}").recordings():
        open_now: dict[str, tuple[str, float]] = {}
        for event in recording.events():
            for activity in first:
                if event.labels == (home.labels[activity],) and event.sensor in (door, coats):
                    before, when = open_now.get(event.resident, ("", 0.0))
                    if before != activity or event.time.timestamp() - when > 600:
                        first[activity][event.sensor] += 1
                    open_now[event.resident] = (activity, event.time.timestamp())
    assert first["leave"][coats] > 5 * first["leave"][door] and first["enter"][door] > 5 * first["enter"][coats]


def sensor_baseline(name) -> float:
    dataset = read(f"simulated:{name}")
    labels = dataset.homes[0].label_names
    fitted = SensorLookup.fit(dataset.windows("train"), labels)
    windows = list(dataset.windows("test"))
    truth = [event.labels for window in windows for event in window.events]
    return score(truth, [label for window in windows for label in fitted.predict(window)], labels).weighted_f1


def test_sensors_alone_do_not_tell():
    figures = [sensor_baseline(f"D{number}") for number in range(7)]
    assert 0.5 < median(figures) < 0.75 and max(figures) < 0.85, figures


def test_residents_act_at_the_same_time():
    home = next(home for home in D if len(home.residents) >= 2)
    mixed = [len({event.resident for event in window.events if event.resident}) > 1 for window in read(f"simulated:{home.name}").windows()]
    assert sum(mixed) > 0.3 * len(mixed)


def test_the_thought_names_every_event_once():
    home = house("P3")
    thing = {(place.room, place.name): thing for thing, places in home.sensors.items() for place in places}
    seen = Counter()
    for window in list(read("simulated:P3").windows())[:50]:
        labels = true_answer(window)
        if labels is None:
            continue
        said = [plain(label) if event.labels else "unclear" for event, label in zip(window.events, labels)]
        parts = [next(part for end, part in DAYTIMES if event.time.hour < end) for event in window.events]
        places = ["motion" if event.sensor in MOTION_NAMES else thing[event.room, event.sensor] for event in window.events]
        seen.update(places)
        asked = zip(parts, places, said, labels, strict=True)
        lines = [f"{n} {part} {place}: {activity} {label}" for n, (part, place, activity, label) in enumerate(asked, 1)]
        assert reasoning(home, window, labels) == "\n".join(lines)
    assert len(seen) > 10 and seen["motion"]


def test_the_first_word_of_a_label_tells_what_it_stands_for():
    firsts = [first_word(name) for of in (*ACTIVITIES.values(), *MERGED.values()) for name in of.names]
    assert len(firsts) == len(set(firsts)) > 100
    merges = Counter()
    for home in P:
        for activity, label in home.labels.items():
            merged = next((name for name, of in MERGED.items() if activity in of.activities and label.replace("_", " ") in of.names), None)
            assert plain(label) == (merged or {"wake": "sleep"}.get(activity, activity))
            assert merged is None or all(home.labels.get(other, label) == label for other in MERGED[merged].activities)
            merges[merged] += 1
        assert list(home.home.label_names) == list(dict.fromkeys(home.labels.values()))
    assert all(merges[name] > 50 for name in (None, *MERGED))
