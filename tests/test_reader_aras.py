"""ARAS, on hand-written days of a few seconds, and on the real ones."""

import gzip

import pytest

from harkd.homes.dataset import read
from harkd.homes.readers.aras import SENSORS
from tests.helpers import SHARED
from tests.reader_cases import faults, survives, told, write

REAL = SHARED / "data" / "aras"
needs_real = pytest.mark.skipif(not (REAL / "House_A" / "DAY_1.txt.gz").is_file(), reason="needs ../shared/data/aras")


def day(*seconds: tuple[set[int], int, int], end: str = "\r\n") -> str:
    """Each second: the columns that are 1, counted from 1, and two activities."""
    return "".join(" ".join(["01"[n in on] for n in range(1, 21)] + [str(one), str(two)]) + end for on, one, two in seconds)


TWO_DAYS = {
    "House_A/DAY_1.txt": day(({4}, 12, 2), ({4}, 12, 2), ({4, 8, 12}, 12, 2), ({8}, 7, 12), ({8}, 7, 12), (set(), 2, 2)),
    "House_A/DAY_10.txt.gz": gzip.compress(day((set(), 11, 11), ({20}, 11, 11), (set(), 27, 27)).encode(), mtime=0),
    "House_A/README": "about",
}


def test_changes_from_second_to_second_are_events(tmp_path):
    dataset = read(f"aras:{write(tmp_path, TWO_DAYS)}")
    assert told(dataset) == [
        ("00:00:02", "kitchen fridge opened", ("Watching TV",), ""),  # the other is out; column 4 was 1 from the first second on
        ("00:00:02", "hall house door opened", ("Watching TV",), ""),
        ("00:00:03", "living room couch place 1 released", ("Preparing Dinner", "Watching TV"), ""),
        ("00:00:03", "hall house door closed", ("Preparing Dinner", "Watching TV"), ""),
        ("00:00:05", "kitchen fridge closed", ("Going Out",), ""),  # both are out
        ("00:00:01", "bedroom bed occupied", ("Sleeping",), ""),
        ("00:00:02", "bedroom bed released", ("Changing Clothes",), ""),
    ]
    assert [(it.id, it.group, it.residents) for it in dataset.recordings()] == [
        ("House_A/DAY_1", "House_A/DAY_1", ("1", "2")),
        ("House_A/DAY_10", "House_A/DAY_10", ("1", "2")),
    ]
    assert dataset.survey().noticed == {"day that has not one line for each second": 2}
    assert len(dataset.homes[0].label_names) == 27


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_line_ends_and_gzip_do_not_matter(tmp_path, end, zipped):
    text = day(({1}, 11, 2), (set(), 11, 2), ({19}, 7, 2), end=end).encode()
    write(tmp_path, {"House B/DAY_2.txt" + ".gz" * zipped: gzip.compress(text) if zipped else text})
    for root in (tmp_path, tmp_path / "House B"):  # the folder of both houses, or that of one
        dataset = read(f"aras:{root}")
        assert [home.name for home in dataset.homes] == ["aras-B"]
        assert told(dataset) == [
            ("00:00:01", "kitchen cupboard 1 closed", ("Sleeping",), ""),
            ("00:00:02", "kitchen distance sensor somebody near", ("Preparing Dinner",), ""),
        ]


def test_two_houses_are_two_homes(tmp_path):
    text = day((set(), 1, 2), ({3}, 1, 2))
    dataset = read(f"aras:{write(tmp_path, {'House_A/DAY_1.txt': text, 'House_B/DAY_1.txt': text})}")
    assert [window.id for window in dataset.windows()] == ["aras-A/House_A/DAY_1/0000", "aras-B/House_B/DAY_1/0000"]
    assert [window.events[0].description for window in dataset.windows()] == ["living room television remote ON", "hall house door opened"]
    assert len({it.group for it in dataset.recordings()}) == 2
    assert all(len(set(columns.split(", "))) == 20 for columns in SENSORS.values())


def test_a_full_day_is_read_whole(tmp_path):
    text = day(*[(set(), 11, 11)] * 86_399, ({20}, 11, 11))
    dataset = read(f"aras:{write(tmp_path, {'House_A/DAY_3.txt': text})}")
    assert told(dataset) == [("23:59:59", "bedroom bed occupied", ("Sleeping",), "")] and dataset.survey().noticed == {}


test_faults_are_told = faults(
    "aras",
    ({"House_A/DAY_1.txt": "0 " * 20 + "1\n"}, "DAY_1.txt, line 1: not 20 sensors"),
    ({"House_A/DAY_1.txt": day((set(), 1, 1)) + "2 " + "0 " * 19 + "1 1\n"}, "DAY_1.txt, line 2: not 20 sensors"),
    ({"House_A/DAY_1.txt": day((set(), 1, 28))}, "DAY_1.txt, line 1: an activity is a number from 1 to 27, not '1 28'"),
    ({"House_A/DAY_1.txt": day((set(), 0, 1))}, "an activity is a number from 1 to 27"),
    ({}, "holds no House_A/DAY_1.txt"),
    ({"House_A/DAY_10.txt.gz": b"0 0 1"}, "DAY_10.txt.gz cannot be read"),
    ({"House_A/DAY_10.txt.gz": TWO_DAYS["House_A/DAY_10.txt.gz"][:-9]}, "DAY_10.txt.gz cannot be read: Compressed file ended"),
)
test_any_bytes = survives("aras", {name: content for name, content in TWO_DAYS.items() if name.endswith("_1.txt")})


def changes(day: int) -> int:
    """The sensor changes of a real day, counted column by column."""
    with gzip.open(REAL / "House_A" / f"DAY_{day}.txt.gz", "rt") as file:
        columns = list(zip(*(line.split()[:20] for line in file)))
    return sum(before != now for column in columns for before, now in zip(column, column[1:]))


@needs_real
def test_real_days():
    dataset = read(f"aras:{REAL}")
    assert [it.id for it in dataset.recordings()] == [f"House_A/DAY_{day}" for day in range(1, 31)]
    for day in (1, 2):
        assert sum(1 for _ in dataset.index[day - 1].events()) == changes(day) > 1000
        assert not dataset.index[day - 1].notes().noticed["day that has not one line for each second"]


@needs_real
@pytest.mark.slow
def test_real_house():
    report = read(f"aras:{REAL}").survey()
    assert (report.recordings, report.sensors, report.events, report.scored, report.noticed) == (30, 20, 103_945, 103_945, {})
