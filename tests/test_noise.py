"""Noise: what each kind does to a recording, and what it leaves alone."""

import hashlib
from collections import Counter
from datetime import datetime, timedelta
from itertools import islice

import pytest

from harkd.errors import UserError
from harkd.homes.dataset import read
from harkd.homes.events import Event, Home, Recording
from harkd.homes.noise import Noise, apply, lost, parse_noise
from tests.marble_files import marble

START = datetime(2021, 3, 1, 23, 0)
ROOMS = ("kitchen", "bath", "hall", "study")
HOME = Home("h", tuple((room, (f"door {room}",)) for room in ROOMS), ())


def an_event(n: int) -> Event:
    """Sixty sensors in turn, which are on, then off, then half on."""
    state, labels = ("on", "off", "half")[n // 60 % 3], ("A",) if n % 4 else ()
    return Event(n, START + timedelta(seconds=7 * n), f"sensor {n % 10}", ROOMS[n // 3 % 4], state, labels, "x")


def a_recording(events: int = 400, id: str = "r") -> Recording:
    return Recording(id, HOME, "g", ("x",), lambda: (an_event(n) for n in range(events)))


def noisy(spec: str, recording: Recording | None = None, seed: int = 0) -> list[Event]:
    return list(apply(recording or a_recording(), parse_noise(spec), seed).events())


# the specification


def test_a_specification_is_read():
    spec = "drop=0.1,jitter=30s,ghost=.05,stuck=0.05, rename=1,swap-rooms,shift=-2h,speed=0.5"
    assert parse_noise(spec) == Noise(0.1, 30, 0.05, 0.05, 1.0, True, -7200, 0.5)
    assert parse_noise("stuck=R7,jitter=1.5m,shift=1d") == Noise(stuck="R7", jitter=90, shift=86400)
    assert parse_noise("") == Noise() == parse_noise("drop=0,speed=1")
    assert parse_noise("stuck=couch place 1").stuck == "couch place 1"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("drip=0.1", "'drip=0.1'"), ("drop", "'drop'"), ("drop=0.1,,jitter=1s", "''"), ("drop=0.1,drop=0.2", "drop is given twice"),
        ("drop=1.1", "'drop=1.1'"), ("ghost=-0.1", "'ghost=-0.1'"), ("rename=nan", "'rename=nan'"), ("drop=0.1=2", "'drop=0.1=2'"),
        ("jitter=30", "'jitter=30'"), ("jitter=-1s", "'jitter=-1s'"), ("jitter=2d", "'jitter=2d'"), ("shift=h", "'shift=h'"),
        ("shift=9999d", "'shift=9999d'"), ("speed=0", "'speed=0'"), ("speed=101", "'speed=101'"), ("swap-rooms=1", "'swap-rooms=1'"),
        ("stuck=", "'stuck='"), ("stuck=7", "'stuck=7'"), ("stuck=-1", "'stuck=-1'"), ("stuck", "'stuck'"), ("drop=1s", "'drop=1s'"),
        ("swap_rooms", "'swap_rooms'"), ("speed=٢", "'speed=٢'"),
    ],
)  # fmt: skip
def test_a_wrong_part_is_named_in_one_sentence(spec, part):
    with pytest.raises(UserError) as caught:
        parse_noise(spec)
    assert part in str(caught.value) and "\n" not in str(caught.value)


# one kind at a time


def test_no_noise_is_the_recording_itself():
    recording = a_recording()
    assert apply(recording, Noise()) is recording
    assert noisy("speed=1,shift=0s") == list(recording.events())


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_drop(share):
    every, kept = list(a_recording(2000).events()), noisy(f"drop={share}", a_recording(2000))
    gone = list(lost(a_recording(2000), Noise(drop=share)))
    assert sorted(kept + gone, key=lambda event: event.id) == every and set(kept) <= set(every)
    assert len(gone) == pytest.approx(2000 * share, abs=5 * (2000 * share * (1 - share)) ** 0.5)
    assert noisy("drop=1") == [] and not list(lost(a_recording(), Noise(ghost=1)))


def test_a_higher_share_takes_what_a_lower_one_takes():
    kept = [{event.id for event in noisy(f"drop={share}")} for share in (0.1, 0.3, 0.8)]
    assert kept[0] > kept[1] > kept[2]
    renamed = [{event.id for event in noisy(f"rename={share}") if event.sensor.startswith("device")} for share in (0.1, 0.5, 1)]
    assert renamed[0] < renamed[1] < renamed[2] and len(renamed[2]) == 400
    changed = [{event.id for event in noisy(f"stuck={share}") if event.state != "on"} for share in (0, 0.3, 1)]
    assert changed[0] > changed[1] > changed[2] == set()
    ghosts = [{event.id for event in noisy(f"ghost={share}") if event.id < 0} for share in (0.1, 0.4)]
    assert ghosts[0] < ghosts[1]


def test_jitter_moves_times_within_its_bounds_and_the_stream_is_in_order():
    every, moved = list(a_recording().events()), noisy("jitter=30s")
    assert [event.time for event in moved] == sorted(event.time for event in moved)
    assert [event.id for event in moved] != sorted(event.id for event in moved) and len(moved) == 400
    gaps = [(event.time - every[event.id].time).total_seconds() for event in moved]
    assert -30 <= min(gaps) < -28 and 28 < max(gaps) <= 30 and abs(sum(gaps) / 400) < 4
    assert {(event.id, event.sensor, event.state, event.labels) for event in moved} == {(event.id, event.sensor, event.state, event.labels) for event in every}


@pytest.mark.parametrize(("spec", "ahead"), [("drop=0.5,ghost=0.5,stuck=0.5,rename=0.5,shift=1h,speed=2", 1), ("jitter=35s", 12), ("jitter=70s", 22)])
def test_no_more_is_held_than_jitter_asks_for(spec, ahead):
    """One event every 7 s: two jitters of 35 s hold ten events, whatever the length of the recording."""
    drawn = []

    def events():
        for n in range(10**9):
            drawn.append(n)
            yield an_event(n)

    for event in islice(apply(Recording("r", HOME, "g", (), events), parse_noise(spec)).events(), 300):
        assert event.id < 0 or len(drawn) - event.id <= ahead
    assert len(drawn) < 800


def test_ghosts_come_between_events_and_show_what_was_seen():
    every, mixed = list(a_recording(2000).events()), noisy("ghost=0.2", a_recording(2000))
    assert [event for event in mixed if event.id >= 0] == every
    ghosts = [event for event in mixed if event.id < 0]
    assert len({ghost.id for ghost in ghosts}) == len(ghosts) == pytest.approx(400, abs=90)
    assert not any(ghost.labels or ghost.resident for ghost in ghosts)
    seen, before, inside = {}, every[0], 0
    for event in mixed:
        if event.id >= 0:
            before = event
            seen.setdefault((event.room, event.sensor), []).append(event.state)
        else:
            assert event.id == -1 - (before.id + 1) and before.time <= event.time <= every[before.id + 1].time
            inside += before.time < event.time < every[before.id + 1].time
            assert event.state in seen[event.room, event.sensor]
    assert inside > 0.9 * len(ghosts) and len({(ghost.room, ghost.sensor) for ghost in ghosts}) > 15
    assert {ghost.state for ghost in ghosts} == {"on", "off", "half"}


def test_a_stuck_sensor_shows_its_first_state():
    every = list(a_recording().events())
    for event, was in zip(noisy("stuck=sensor 3"), every, strict=True):
        assert event.state == ("on" if was.sensor == "sensor 3" else was.state) and (event.id, event.time, event.labels) == (was.id, was.time, was.labels)
    shown = {}
    for event in noisy("stuck=0.4"):
        shown.setdefault((event.room, event.sensor), set()).add(event.state)
    kinds = Counter(len(states) for states in shown.values())
    assert kinds[1] >= 3 and kinds[3] >= 3 and set(kinds) <= {1, 2, 3}


def test_renamed_sensors_have_one_new_name_in_all_recordings_of_a_home():
    names = {}
    for id in ("r", "s"):
        for event, was in zip(noisy("rename=0.5", a_recording(id=id)), a_recording().events(), strict=True):
            names.setdefault((was.room, was.sensor), set()).add(event.sensor)
            assert (event.id, event.time, event.room, event.state, event.labels) == (was.id, was.time, was.room, was.state, was.labels)
    new = [next(iter(after)) for (_, before), after in names.items() if after != {before}]
    assert all(len(after) == 1 for after in names.values())
    assert 0.2 < len(new) / len(names) < 0.8 and len(set(new)) == len(new) and not set(new) & {sensor for _, sensor in names}


def test_swapped_rooms_all_have_new_names():
    pairs = {(was.room, event.room) for event, was in zip(noisy("swap-rooms"), a_recording().events(), strict=True)}
    assert {old for old, _ in pairs} == {new for _, new in pairs} <= set(ROOMS) and all(old != new for old, new in pairs)
    assert len({tuple(event.room for event in noisy("swap-rooms", seed=seed)) for seed in range(8)}) > 1


def test_shift_and_speed_are_exact():
    for n, event in enumerate(noisy("shift=-2h,speed=0.5")):
        assert event.time == START - timedelta(hours=2) + timedelta(seconds=14 * n)
    assert noisy("speed=2")[300].time == START + timedelta(seconds=1050)


# all of them


ALL = "drop=0.2,jitter=20s,ghost=0.3,stuck=0.3,rename=0.3,swap-rooms,shift=2h,speed=0.5"


def test_with_all_kinds_every_event_keeps_its_id_and_its_truth():
    every, mixed = list(a_recording().events()), noisy(ALL)
    own = [event for event in mixed if event.id >= 0]
    assert len({event.id for event in own}) == len(own) == 400 - len(list(lost(a_recording(), parse_noise(ALL))))
    assert all((event.labels, event.resident) == (every[event.id].labels, "x") for event in own)
    assert [event.time for event in mixed] == sorted(event.time for event in mixed)


def test_the_same_on_every_machine():
    """As `printf '[0, "h", "event", "r", 5]' | sha512sum` and so on say: no later version may draw otherwise, or results could not be compared."""

    def uniform(text: str) -> float:
        return int(hashlib.sha512(text.encode()).hexdigest()[:16], 16) / 2**64

    dropped = [n for n in range(400) if uniform(f'[0, "h", "event", "r", {n}]') < 0.1]
    assert [event.id for event in lost(a_recording(), Noise(drop=0.1))] == dropped and len(dropped) > 20
    digest = hashlib.sha256("\n".join(f"{e.id} {e.time} {e.description}" for e in noisy(ALL)).encode()).hexdigest()
    assert digest[:16] == "5fcb8974a869cb72"


def test_noise_depends_on_seed_home_and_recording():
    fates = [noisy("drop=0.5", seed=1), noisy("drop=0.5"), noisy("drop=0.5", a_recording(id="s"))]
    assert len({tuple(event.id for event in kept) for kept in fates}) == 3
    assert noisy(ALL) == noisy(ALL) != noisy(ALL, seed=1)


def test_the_fate_of_an_event_does_not_depend_on_others():
    late = Recording("r", HOME, "g", (), lambda: (an_event(n) for n in range(100, 400)))
    assert {event.id: event.time for event in noisy("drop=0.3,jitter=20s", late)} == {e.id: e.time for e in noisy("drop=0.3,jitter=20s") if e.id >= 100}


# a data set


def test_a_dataset_reads_with_noise(tmp_path):
    data = f"marble:{marble(tmp_path, days=5, events=60)}"
    clean, dataset = read(data), read(data, noise="drop=0.4,ghost=0.2", noise_seed=3)
    whole = Counter((window.recording, event.id) for window in clean.windows() for event in window.events)
    seen = [(window.recording, event.id) for window in dataset.windows() for event in window.events if event.id >= 0]
    gone = [(recording.id, event.id) for recording, event in dataset.lost()]
    assert Counter(seen + gone) == whole and 70 < len(gone) < 170 and not list(clean.lost())
    sizes = [len(window.events) for window in dataset.windows()]
    assert sizes.count(10) >= len(sizes) - 5 and dataset.survey().events == sum(sizes) != clean.survey().events == 300
    assert {recording.group for recording, _ in dataset.lost("test")} == {window.group for window in dataset.windows("test")}
    assert {event.state for window in read(data, noise="stuck=fridge").windows() for event in window.events} == {"opened"}
    couch = [event.state for window in read("simulated:D0", noise="stuck=couch").windows() for event in window.events if event.sensor == "couch"]
    assert len(couch) > 20 and set(couch) == {"occupied"}
    for name, wrong in ((data, "frigde"), (data, "frid"), ("simulated:D0", "frigde")):
        with pytest.raises(UserError, match="no home of .* has a sensor of that name"):
            read(name, noise=f"stuck={wrong}")
    with pytest.raises(UserError, match="'drop=2'"):
        read(data, noise="drop=2")
