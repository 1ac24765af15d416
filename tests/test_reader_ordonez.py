"""UCI's Ordonez homes, on hand-written tables with their quirks, and on the real ones."""

from datetime import datetime

import pytest

from harkd.homes.dataset import read
from harkd.homes.events import Notes
from harkd.homes.readers.ordonez import _intervals
from tests.helpers import SHARED
from tests.reader_cases import events, faults, survives, told, write

REAL = SHARED / "data" / "uci_adl_binary"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/uci_adl_binary")

SENSORS = """Start time          \tEnd time            \tLocation\tType\t\tPlace
--------------------\t--------------------\t--------\t--------\t-----
2011-11-28 23:50:00\t\t2011-11-29 07:00:00\t\tBed\t\tPressure\tBedroom
2011-11-29 07:00:05\t2011-11-29 07:00:05 \tDoor\tPIR\tBedroom
2011-11-29 07:01:00\t\t2011-11-29 07:02:00\tDoor\tPIR\tKitchen
2011-11-29 07:01:30\t\t2011-11-29 07:01:40\tFridge\tMagnetic\tKitchen
2011-11-29 07:05:00\t\t2011-11-29 07:04:00\tMaindoor\tMagnetic\tEntrance
2011-11-29 07:03:00\t\t2011-11-29 07:03:10\tToilet\tFlush\tBathroom""".replace("\n", "\r\n")
LABELS = """Start time          \tEnd time            \tActivity\t
--------------------\t--------------------\t--------
2011-11-28 23:55:00\t\t2011-11-29 07:00:30\t\tSleeping\t\t
2011-11-29 07:00:30\t\t2011-11-29 07:02:00\tBreakfast
2011-11-29 07:01:35\t\t2011-11-28 05:01:45\tSnack
2011-11-29 07:03:00\t\t2011-11-28 07:03:30\tToileting
""".replace("\n", "\r\n")
FILES = {"OrdonezB_Sensors.txt": SENSORS, "OrdonezB_ADLs.txt": LABELS}


def test_intervals_become_events_of_days(tmp_path):
    dataset = read(f"ordonez:{write(tmp_path, FILES)}")
    assert told(dataset) == [
        ("23:50:00", "bedroom bed occupied", (), "B"),
        ("07:00:00", "bedroom bed released", ("Sleeping",), "B"),
        ("07:00:05", "bedroom doorway motion ON", ("Sleeping",), "B"),
        ("07:00:05", "bedroom doorway motion OFF", ("Sleeping",), "B"),
        ("07:01:00", "kitchen doorway motion ON", ("Breakfast",), "B"),
        ("07:01:30", "kitchen fridge opened", ("Breakfast",), "B"),
        ("07:01:40", "kitchen fridge closed", ("Snack",), "B"),  # up to 07:03:00, where the next label starts
        ("07:02:00", "kitchen doorway motion OFF", ("Snack",), "B"),
        ("07:03:00", "bathroom toilet flush started", ("Toileting",), "B"),
        ("07:03:10", "bathroom toilet flush ended", (), "B"),
        ("07:04:00", "entrance main door opened", (), "B"),
        ("07:05:00", "entrance main door closed", (), "B"),
    ]
    assert [(it.id, it.group) for it in dataset.recordings()] == [(f"B/2011-11-{day}", f"B/2011-11-{day}") for day in (28, 29)]
    assert [event.id for event in events(dataset, "B/2011-11-29")] == list(range(11))
    report = dataset.survey()
    assert report.repaired == {
        "label that ends before it starts: ends with the next": 2,
        "sensor interval that ends before it starts: ends swapped": 1,
    }
    assert report.unscored == {"outside all label intervals": 4}
    assert report.noticed == {
        "sensor interval that starts before the one above it": 1,
        "label that starts before the one above it ends": 1,
        "event in intervals of several labels": 3,
    }


def test_a_label_that_ends_too_early_ends_where_the_next_starts(tmp_path):
    write(tmp_path, FILES)
    snack, toileting = _intervals(tmp_path / "OrdonezB_ADLs.txt", 1, Notes())[2:]
    assert snack.end == datetime(2011, 11, 29, 7, 3) and toileting.end == toileting.start  # there is no next


def test_rooms_and_homes_are_those_of_the_sensors(tmp_path):
    dataset = read(f"ordonez:{write(tmp_path, FILES | {name.replace('B_', 'A_'): text for name, text in FILES.items()})}")
    assert [home.name for home in dataset.homes] == ["ordonez-A", "ordonez-B"]
    assert dict(dataset.homes[1].rooms) == {
        "bathroom": ("toilet (flush started, flush ended)",),
        "bedroom": ("bed (occupied, released)", "doorway (motion ON, motion OFF)"),
        "entrance": ("main door (opened, closed)",),
        "kitchen": ("doorway (motion ON, motion OFF)", "fridge (opened, closed)"),
    }
    assert len({it.group for it in dataset.recordings()}) == 4


def and_row(name: str, row: str) -> dict[str, str | bytes]:
    return FILES | {name: f"{FILES[name].rstrip()}\r\n{row}\r\n"}


DATES = "2011-11-29 07:00:00\t2011-11-29 07:00:01"
test_faults_are_told = faults(
    "ordonez",
    (and_row("OrdonezB_Sensors.txt", f"{DATES}\tBed\tPressure"), "OrdonezB_Sensors.txt, line 9: not a start, an end, then location"),
    (and_row("OrdonezB_Sensors.txt", f"2011-11-29 24:00:00\t{DATES[20:]}\tBed\tPressure\tBedroom"), "OrdonezB_Sensors.txt, line 9: not a start"),
    (and_row("OrdonezB_ADLs.txt", f"{DATES}\tDancing"), "OrdonezB_ADLs.txt, line 7: not a start, an end, then one of Leaving"),
    (and_row("OrdonezB_ADLs.txt", "2011-11-29\t2011-11-29\tSnack"), "OrdonezB_ADLs.txt, line 7: not a start"),
    ({}, "holds no OrdonezA_Sensors.txt"),
    ({"OrdonezB_Sensors.txt": SENSORS}, "OrdonezB_ADLs.txt cannot be read"),
)
test_any_bytes = survives("ordonez", FILES)


@needs_real
def test_real_counts():
    sensors, labels = _intervals(REAL / "OrdonezA_Sensors.txt", 3, Notes()), _intervals(REAL / "OrdonezA_ADLs.txt", 1, notes := Notes())
    assert (len(sensors), len(labels)) == (409, 248)
    assert +notes.repaired == {"label that ends before it starts: ends with the next": 3}
    assert +notes.noticed == {"label that starts before the one above it ends": 2}
    assert [f"{labels[line - 3].end:%d %H:%M:%S}" for line in (72, 81, 83)] == ["01 19:30:01", "02 12:21:19", "02 12:37:47"]
    report = read(f"ordonez:{REAL}").survey()
    assert (report.recordings, report.events, report.sensors) == (15, 2 * 409, 12)  # the last night ends on a fifteenth day
    assert report.scored == 766 and "Dinner" not in report.labels
