"""CASAS files, hand-written in each of their forms, and a long one, made here, whose reading must not cost memory."""

import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from harkd.homes.dataset import read
from harkd.homes.readers.casas_homes import LAYOUTS, name_sensor, places, read_state
from tests.helpers import ROOT
from tests.reader_cases import events, faults, survives, told, write

CLASSIC = """2010-11-04 23:58:50.209589 M003 ON Sleeping begin
2010-11-04 23:58:52 \tM003  OFF
2010-11-04\t23:59:01.5\tM007\tONc\t
2010-11-05 00:00:01.1 T002 21.5

2010-11-05 00:10:00.000001 c ONM026 Sleeping end
2010-11-05 00:10:00.5 ENTERHOME ON Enter_Home begin
2010-11-05 00:10:01.5 D001 OPEN
2010-11-05 00:10:02.5 M019 O
2010-11-05 00:10:03.5 ENTERHOME OFF Enter_Home end
2010-11-05 00:10:04.5 M016
2010-11-05 00:10:05.5 M015 ON
"""
TWO_PEOPLE = """2009-08-24 07:00:00.1 M050 ON R1_Sleep begin
2009-08-24 07:00:01.1 M045 ON R2 work in office begin
2009-08-24 07:00:02.1 M006 OFF
2009-08-24 07:00:03.1 M018 ON Meal begin
2009-08-24 07:00:04.1 M018 ON R1_Sleep end
2009-08-24 07:00:05.1 M018 OFF R2 work in office end
2009-08-24 07:00:06.1 D012 CLOSE Cleaning end
2009-08-24 07:00:07.1 M001 OFF R1_Sleep begin
2009-08-24 07:00:08.1 M002 OFF
2009-08-25 07:00:08.1 M002 OFF Meal begin
2009-08-25 07:00:09.1 M002 ON
2009-08-25 07:00:10.1 M002 OFF Meal end
"""
ANNOTATED = """2012-07-20 10:38:54.512364\tM001\tOutsideDoor\tEntry\tON\tControl4-Motion\tStep_Out
2012-07-20 10:38:55.1\tLS002\tBedroom\tBedroom\t12\tControl4-LightSensor
2012-07-20 10:38:56.1\tMA016\tKitchen\tKitchen\tOFF\tControl4-MotionArea\tCook
2012-07-20 10:38:57.1\tD002\tOutsideDoor\tBackDoor\tCLOSE\tControl4-Door\tCook"""
RELEASE = """2012-07-20,10:38:54.51,KitchenAStove,ON,Cook="begin"
2012-07-20,10:38:55.51,KitchenAStove,OFF
2012-07-20,10:38:56.51,MainDoor,OPEN,Cook="end"
2012-07-20,10:38:57.51,MainDoor,CLOSE,Leave_Home
"""


def test_classic_files_label_what_lies_between_begin_and_end(tmp_path):
    dataset = read(f"casas:{write(tmp_path, {'aruba/data': CLASSIC})}")
    assert told(dataset) == [
        ("23:58:50", "bedroom bed motion M003 ON", ("Sleeping",), ""),
        ("23:58:52", "bedroom bed motion M003 OFF", ("Sleeping",), ""),
        ("23:59:01", "bedroom motion M007 ON", ("Sleeping",), ""),
        ("00:00:01", "temperature T002 21.5", ("Sleeping",), ""),  # past midnight it goes on
        ("00:10:00", "dining room motion M014 ON", ("Sleeping",), ""),  # the line of the end is part of it
        ("00:10:01", "entrance front door D001 OPEN", ("Enter_Home",), ""),
        ("00:10:05", "kitchen sink motion M015 ON", (), ""),
    ]
    assert [(it.id, it.group) for it in dataset.recordings()] == [(f"2010-11-0{day}", f"aruba/2010-11-0{day}") for day in (4, 5)]
    assert [event.id for event in events(dataset, "2010-11-05")] == [0, 1, 2, 3]
    assert events(dataset)[0].time == datetime(2010, 11, 4, 23, 58, 50, 209589) and events(dataset)[3].time.microsecond == 100_000
    assert dataset.homes[0].name == "casas-aruba" and dataset.homes[0].label_names == ("Enter_Home", "Sleeping")
    report = dataset.survey()
    assert report.repaired == {
        "value with a slip of the log": 2,
        "line of no sensor: left out": 2,
        "empty line: left out": 1,
        "sensor with a slip of the log": 1,
        "value that cannot be read: left out": 1,
        "line without date, time, sensor and value: left out": 1,
    }
    assert report.unscored == {"outside all activities": 1} and report.noticed == {}


def test_activities_of_several_residents_overlap(tmp_path):
    dataset = read(f"casas:{write(tmp_path, {'twor.2009/data': TWO_PEOPLE})}")
    assert [labels for _, _, labels, _ in told(dataset)] == [
        ("Sleep",),
        ("Sleep", "work in office"),
        ("Sleep", "work in office"),
        ("Sleep", "work in office", "Meal"),  # this begin has no end before the next: it labels its own line alone
        ("Sleep", "work in office"),
        ("work in office",),
        ("Cleaning",),  # an end without a begin
        ("Sleep",),  # a begin without an end
        (),
        ("Meal",),
        ("Meal",),
        ("Meal",),
    ]
    assert {it.residents for it in dataset.recordings()} == {("R1", "R2")}
    assert all("R1" not in label and "R2" not in label for label in dataset.homes[0].label_names)
    assert told(dataset)[2][1] == "living room couch motion M006 OFF"
    assert dataset.survey().repaired == {
        "begin without an end: labels its own line alone": 2,
        "end without a begin: labels its own line alone": 1,
    }


def test_annotated_columns_label_one_event_each(tmp_path):
    dataset = read(f"casas:{write(tmp_path, {'hh101/hh101.ann.txt': ANNOTATED, 'hh101/README.txt': 'about'})}")
    assert told(dataset) == [
        ("10:38:54", "outside door entry motion M001 ON", ("Step_Out",), ""),
        ("10:38:55", "bedroom brightness LS002 12", (), ""),
        ("10:38:56", "kitchen area motion MA016 OFF", ("Cook",), ""),
        ("10:38:57", "outside door back door door D002 CLOSE", ("Cook",), ""),
    ]


def test_the_release_in_commas(tmp_path):
    dataset = read(f"casas:{write(tmp_path, {'hh1.csv': RELEASE, 'hh2.csv': RELEASE})}")
    assert told(dataset)[:4] == [
        ("10:38:54", "kitchen a stove ON", ("Cook",), ""),
        ("10:38:55", "kitchen a stove OFF", ("Cook",), ""),
        ("10:38:56", "main door OPEN", ("Cook",), ""),
        ("10:38:57", "main door CLOSE", ("Leave_Home",), ""),
    ]
    assert [home.name for home in dataset.homes] == ["casas-hh1", "casas-hh2"]
    assert len({it.group for it in dataset.recordings()}) == 2


def test_a_date_that_comes_back_is_a_recording_of_the_same_group(tmp_path):
    lines = CLASSIC.splitlines(keepends=True)
    dataset = read(f"casas:{write(tmp_path, {'data': ''.join([*lines[:2], lines[3], *lines[2:3], *lines[5:]])})}")
    assert [(it.id, it.group.rpartition("/")[2]) for it in dataset.recordings()] == [
        ("2010-11-04", "2010-11-04"),
        ("2010-11-05", "2010-11-05"),
        ("2010-11-04#2", "2010-11-04"),
        ("2010-11-05#2", "2010-11-05"),
    ]
    assert all(event.labels for event in events(dataset)[:5])  # Sleeping goes on through all of them


@pytest.mark.parametrize(
    ("sensor", "value", "state"),
    [
        *((f"M00{n}", value, "ON") for n, value in enumerate(["ON", "ONc", "ON5", "ON`", "ON0", "ONM026", "on"])),
        ("M001", "OF", "OFF"),
        ("D001", "OPENv", "OPEN"),
        ("D001", "CLOSED", "CLOSE"),
        ("I04", "PRES", "PRESENT"),
        ("M001", "O", None),
        ("M001", "21", None),
        ("T001", "21", "21"),
        ("KitchenAStove", "ON5", "ON5"),
    ],
)
def test_values_with_slips(sensor, value, state):
    assert read_state(sensor, value) == state


def test_layouts_place_each_sensor_once_and_name_it_by_its_id():
    for home, layout in LAYOUTS.items():
        listed = [sensor for part in layout.split("; ") for sensor in part.partition(": ")[2].split()]
        assert len(listed) == len(set(listed)) == len(places(home)) and all(room for room, _ in places(home).values())
        assert len({name_sensor(sensor, *where) for sensor, where in places(home).items()}) == len(listed)
    assert {home: len(places(home)) for home in LAYOUTS} == {"aruba": 35, "cairo": 27, "milan": 33, "kyoto": 39 + 24}
    assert places("nowhere") == {} and name_sensor("Kitchen", "", "") == ("", "kitchen")


test_faults_are_told = faults(
    "casas",
    ({}, "holds no file of CASAS"),
    ({"x.txt": "This text has no event.\n"}, "x.txt, line 1: no line of this file reads"),
    ({"data": b"\n201\xff"}, "data is not UTF-8 text: invalid start byte at byte 3 of line 2"),
    ({"one/hh1.csv": RELEASE, "two/hh1.csv": RELEASE}, "holds two files of one home"),
)
test_any_bytes_of_classic_files = survives("casas", {"data": CLASSIC + TWO_PEOPLE})
test_any_bytes_of_other_files = survives("casas", {"hh1.ann.txt": ANNOTATED, "hh2.csv": RELEASE})

PEAK = """
import resource, sys
from harkd.homes.dataset import read
events = sum(len(window.events) for window in read("casas:" + sys.argv[1]).windows())
print(events, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(path, lines: int, days: int) -> int:
    """KiB at most in use while all windows of a file are read: motion at even steps, with an activity every 50 lines."""
    step = timedelta(days=days) / lines
    path.mkdir()
    with open(path / "data", "w") as file:
        for n in range(lines):
            mark = {0: " Relax begin", 30: " Relax end"}.get(n % 50, "")
            file.write(f"{datetime(2010, 11, 4) + n * step:%Y-%m-%d %H:%M:%S.%f} M{n % 31 + 1:03d} {'ON' if n % 2 else 'OFF'}{mark}\n")
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    read_back, kibibytes = map(int, done.stdout.split())
    assert read_back == lines
    return kibibytes


def test_memory_does_not_grow_with_the_file(tmp_path):
    """100,000 events of one day peak at most 2 MiB higher than 10,000; held in memory they would take some 40 MiB."""
    small, large = (peak(tmp_path / f"aruba{lines}", lines, days=1) for lines in (10_000, 100_000))
    assert large - small <= 2048, (small, large)


@pytest.mark.slow
def test_a_recording_as_long_as_arubas(tmp_path):
    """1.7 million events over 220 days peak at most 4 MiB higher than 17,000."""
    small, large = (peak(tmp_path / f"aruba{lines}", lines, days=220) for lines in (17_000, 1_700_000))
    assert large - small <= 4096, (small, large)
