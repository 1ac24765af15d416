"""MARBLE's real files, where they are at hand."""

from datetime import date

from harkd.homes.dataset import read
from tests.helpers import MARBLE, needs_marble


@needs_marble
def test_real_recordings():
    dataset = read(f"marble:{MARBLE}")
    report = dataset.survey()
    assert (report.recordings, report.groups, report.residents, report.sensors) == (20, 12, 10, 16)
    assert (report.events, report.scored) == (620, 455)
    assert report.unscored == {"TRANSITION": 165} and report.repaired == {}
    assert report.noticed == {
        "label interval that starts before the one above it ends": 32 + 12 + 4 + 4,
        "sensor still ON at the end of its recording": 7,
        "label interval given twice": 6,
        "label interval of zero length": 3,
        "OFF of a sensor that was not ON": 1,
    }
    assert report.labels["COOKING"] == 126 and sum(report.labels.values()) == 455
    assert read(f"marble:{MARBLE}", transition="label").survey().labels["TRANSITION"] == 165


@needs_marble
def test_real_labels_are_those_of_a_plain_lookup():
    """Against the rule of public code on MARBLE: the first interval, in the order of the file, that holds the event."""
    for found in read(f"marble:{MARBLE}", transition="label").recordings():
        folder = MARBLE / found.id
        lines = (folder / "environmental.csv").read_text().splitlines()[1:]
        for line, event in zip(lines, found.events(), strict=True):
            _, _, time, subject = line.replace('"', "").split(",")
            rows = (folder / f"subject-{subject}" / "labels.csv").read_text().split()[1:]
            first = next(act for start, end, act in (row.split(",") for row in rows) if int(start) <= int(time) <= int(end))
            assert event.labels == (first,) and event.resident == subject


@needs_marble
def test_real_windows_and_splits():
    dataset = read(f"marble:{MARBLE}")
    sides = {split: list(dataset.windows(split)) for split in ("train", "validation", "test")}
    every = list(dataset.windows())
    assert {split: len(windows) for split, windows in sides.items()} == {"train": 50, "validation": 2, "test": 19}
    assert len({window.id for window in every}) == len(every) == 71 and sum(len(window.events) for window in every) == 620
    groups = [{window.group for window in windows} for windows in sides.values()]
    assert not any(one & other for one in groups for other in groups if one is not other)
    assert [len(side) for side in groups] == [9, 1, 2]
    seen = [
        {(resident, event.time.date()) for it in dataset.recordings(split) for event in it.events() for resident in it.residents}
        for split in sides
    ]
    assert not any(one & other for one in seen for other in seen if one is not other)  # nobody is on two sides on one day
    first = next(dataset.recordings())
    assert first.id == "A1a/instance1" and next(first.events()).time.date() == date(2018, 11, 14)


@needs_marble
def test_real_phone_events_join():
    found = next(it for it in read(f"marble:{MARBLE}", smartphone=True).recordings() if it.id == "A2m/instance1")
    events = list(found.events())
    assert len(events) == 42 and [event.time for event in events] == sorted(event.time for event in events)
    assert [(event.description, event.labels, event.resident) for event in events if event.room == ""] == [
        ("outgoing phone call started", ("MAKING_PHONE_CALL",), "200"),
        ("outgoing phone call ended", ("WATCHING_TV",), "200"),
    ]
