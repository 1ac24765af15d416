"""The multi-resident set of CASAS, on hand-written lines with its quirks, and on the real files."""

from collections import Counter

import pytest

from harkd.homes.dataset import read
from harkd.homes.prompt import system_message
from tests.helpers import SHARED
from tests.reader_cases import events, faults, survives, told, write

REAL = SHARED / "data" / "casas_adlmr"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/casas_adlmr")

LINES = """2008-11-10\t14:28:17.98\tM22\tON 2 2
2008-11-10\t14:28:18.123456\tM06\tOFF 2 13 1 13
2008-11-10\t14:28:19.5\tD12\tOPENv 1 9 2 8
2008-11-10\t14:28:20.5\tM17\tOF 1 1
2008-11-10\t14:28:21.5\tI04\tABSENT 1 12 1 13
2008-11-10\t14:28:22.26658\tM17\tOFF  211
2008-11-10\t14:28:23.11\tM14\tON 2 13 1 13 1 13
2008-11-10\t14:28:24.11\tM99\tON
2008-11-10\t14:28:25.11\tM14\tOFF 1 15"""  # without a final newline
FILES = {"P01.txt": LINES, "P02.txt": LINES[:92], "README": "about"}


def test_events_carry_the_labels_of_their_pairs(tmp_path):
    dataset = read(f"adlmr:{write(tmp_path, FILES | {'P02.txt': ''})}")
    assert told(dataset) == [
        ("14:28:17", "entrance motion M22 ON", ("hang up clothes",), "2"),
        ("14:28:18", "living room couch motion M06 OFF", ("pay electric bill",), "1, 2"),  # both, at the same task
        ("14:28:19", "entrance closet door D12 OPEN", ("play checkers", "play checkers, opponent"), "1, 2"),
        ("14:28:20", "kitchen motion M17 OFF", ("fill medication dispenser",), "1"),
        ("14:28:21", "kitchen item I04 ABSENT", ("read magazine late", "pay electric bill"), "1"),
        ("14:28:22", "kitchen motion M17 OFF", ("set dining table",), "2"),
        ("14:28:23", "living room motion M14 ON", ("pay electric bill",), "1, 2"),
        ("14:28:24", "motion M99 ON", (), ""),
        ("14:28:25", "living room motion M14 OFF", ("pack picnic supplies",), "1"),
    ]
    assert events(dataset)[0].time.microsecond == 980_000
    report = dataset.survey()
    assert report.repaired == {
        "value with a slip of the log": 2,
        "pair of resident and task given twice": 1,
        "resident and task run together": 1,
    }
    assert report.unscored == {"line without a task": 1}
    assert report.noticed == {
        "event with two tasks of one resident": 1,
        "task that its resident does nowhere else": 1,
        "event of a sensor outside the layout": 1,
    }


def test_a_file_is_a_recording_and_a_group_and_no_resident_reaches_the_prompt(tmp_path):
    dataset = read(f"adlmr:{write(tmp_path, FILES)}")
    assert [(it.id, it.group, it.residents) for it in dataset.recordings()] == [("P01", "P01", ("1", "2")), ("P02", "P02", ("1", "2"))]
    (home,) = dataset.homes
    assert len(home.label_names) == len(set(home.label_names)) == 15
    assert sum(len(sensors) for _, sensors in home.rooms) == 37 and "anywhere" not in dict(home.rooms)
    assert "esident" not in system_message(home) and "Person A" not in system_message(home)


PAIRS = "P07.txt, line 2: residents (1 or 2) and tasks (1 to 15) come in pairs"
LINE = "P01.txt, line 1: not a date, a time, a sensor and its value"
test_faults_are_told = faults(
    "adlmr",
    *(
        ({"P07.txt": f"2008-11-10\t14:28:17.98\tM22\tON 2 2\n2008-11-10\t14:28:18\tM22\tOFF {end}\n"}, PAIRS)
        for end in ("1 16", "3 1", "1", "1 2 3", "x y", "111 1", "0", "-1 2")
    ),
    ({"P01.txt": "2008-11-10\t14:28:17.98\tM22"}, LINE),
    ({"P01.txt": "2008-13-10\t14:28:17\tM22\tON"}, LINE),
    ({"P01.txt": "10.11.2008\t1\tM22\tON"}, LINE),
    ({"P01.txt": "2008-11-10\t14:28:17\tM22\tO"}, LINE),
    ({}, "holds no P01.txt"),
)
test_any_bytes = survives("adlmr", FILES)


@needs_real
def test_real_counts():
    dataset = read(f"adlmr:{REAL}")
    report = dataset.survey()
    lines = {path.stem: [line.split() for line in path.read_text().splitlines()] for path in REAL.glob("P*.txt")}
    assert {it.id: sum(1 for _ in it.events()) for it in dataset.recordings()} == {name: len(rows) for name, rows in lines.items()}
    assert (report.recordings, report.groups, report.sensors, report.events, report.scored) == (16, 16, 37, 10_573, 10_572)
    assert report.repaired == {"pair of resident and task given twice": 6, "resident and task run together": 1}
    assert report.unscored == {"line without a task": 1}  # P02 line 1
    assert report.noticed == {"event with two tasks of one resident": 4, "task that its resident does nowhere else": 3}
    assert next(dataset.recordings()).id == "P01" and not events(dataset, "P02")[0].labels
    assert events(dataset, "P06")[451].labels == ("set dining table",) and events(dataset, "P04")[644].labels == ("pay electric bill",)


@needs_real
def test_real_tasks_happen_where_their_names_say():
    """The readme's own numbers would have setting out ingredients (8) at the dining table and gathering food (12) on the couch."""
    rooms, couch = Counter(), Counter()
    for event in events(read(f"adlmr:{REAL}")):
        for label in event.labels:
            rooms[label, event.room] += 1
            couch[label] += event.sensor.startswith("couch")
    total = {label: sum(count for (one, _), count in rooms.items() if one == label) for label, _ in rooms}
    for label in ("fill medication dispenser", "sweep kitchen floor", "set out ingredients"):
        assert rooms[label, "kitchen"] > 0.75 * total[label]
    for label in ("read magazine early", "read magazine late"):
        assert couch[label] > 0.8 * total[label]
    assert rooms["play checkers, opponent", "kitchen"] + rooms["play checkers", "kitchen"] < 0.02 * total["play checkers"]
