"""MARBLE's format on hand-made files."""

from datetime import datetime

import pytest

from harkd.errors import UserError
from harkd.homes.dataset import read
from harkd.homes.readers.marble_home import ACTIVITIES, SENSORS
from tests.marble_files import DAY, NOON, csv, environment, labels, recording
from tests.reader_cases import survives


def only(root, **options):
    """The events of the only recording, and the report."""
    dataset = read(f"marble:{root}", **options)
    (found,) = dataset.recordings()
    return list(found.events()), dataset.survey()


@pytest.fixture
def instance(tmp_path):
    return tmp_path / "B2e" / "instance1"


# events


def test_events_have_room_sensor_state_and_local_time(tmp_path, instance):
    environment(
        instance,
        ("R6", "ON", 0, "201"),
        ("R6", "OFF", 1, "201"),
        ("E2", "ON", 2, "202"),
        ("P7", "ON", 3, "202"),
        ("P7", "OFF", 4, "202"),
        ("E1", "off", 5, "201"),
    )
    labels(instance, "201", (0, 9, "TAKING_MEDICINES"))
    labels(instance, "202", (0, 9, "WATCHING_TV"))
    events, report = only(tmp_path)
    assert [event.description for event in events] == [
        "medicine area medicines cabinet opened",
        "medicine area medicines cabinet closed",
        "living room television turned ON",
        "living room couch place 2 occupied",
        "living room couch place 2 released",
        "kitchen stove turned OFF",
    ]
    assert [event.id for event in events] == list(range(6))
    assert [event.resident for event in events] == ["201", "201", "202", "202", "202", "201"]
    assert [event.labels for event in events] == [(name,) for name in ["TAKING_MEDICINES"] * 2 + ["WATCHING_TV"] * 3 + ["TAKING_MEDICINES"]]
    assert events[3].time == datetime(2020, 9, 13, 13, 0, 3)  # noon UTC is 13:00 with the default offset
    assert only(tmp_path, utc_offset=-3.5)[0][3].time == datetime(2020, 9, 13, 8, 30, 3)
    assert (report.residents, report.sensors, report.events, report.scored) == (2, 4, 6, 6)
    (found,) = read(f"marble:{tmp_path}").recordings()
    assert (found.id, found.residents) == ("B2e/instance1", ("201", "202"))


def test_every_sensor_has_a_name_of_its_own():
    assert len(set(SENSORS.values())) == len(SENSORS) == 18


def test_columns_are_read_by_name_in_any_order_and_with_any_line_end(tmp_path, instance):
    csv(
        instance / "environmental.csv",
        '\ufeff"subject_id", ts,extra,sensor_status,sensor_id',
        f'"9", {NOON},"a, ""b""",OFF,P2 ',
        "",
        end="\n",
    )
    csv(instance / "subject-9" / "labels.csv", "act,ts_end,ts_start", f"USING_PC,{NOON},{NOON - 1}", end="\n")
    events, _ = only(tmp_path)
    assert [(event.description, event.labels, event.resident) for event in events] == [("office chair released", ("USING_PC",), "9")]


def test_events_are_sorted_by_time_and_stay_in_order_at_the_same_time(tmp_path, instance):
    environment(instance, ("R1", "ON", 5, "1"), ("R2", "ON", 2, "1"), ("R5", "ON", 5, "1"), ("R7", "ON", 2, "1"))
    labels(instance, "1", (0, 9, "COOKING"))
    events, report = only(tmp_path)
    assert [event.sensor for event in events] == ["cutlery drawer", "fridge", "pantry", "pots drawer"]
    assert [event.id for event in events] == [0, 1, 2, 3]
    assert report.repaired == {"event before the one above it: sorted by time": 2}


def test_unknown_sensors_keep_their_id_and_are_counted(tmp_path, instance):
    environment(instance, ("R99", "ON", 0, "1"), ("X", "OFF", 1, "1"))
    labels(instance, "1", (0, 9, "COOKING"))
    events, report = only(tmp_path)
    assert [(event.room, event.description) for event in events] == [("", "R99 turned ON"), ("", "X turned OFF")]
    assert report.noticed["event of a sensor that MARBLE does not document"] == 2


def test_missing_switches_are_counted(tmp_path, instance):
    environment(
        instance,
        ("E1", "OFF", 0, "1"),
        ("P3", "ON", 1, "1"),
        ("P3", "ON", 2, "1"),
        ("E2", "ON", 3, "1"),
        ("E1", "ON", 4, "1"),
        ("E1", "OFF", 5, "2"),
    )
    labels(instance, "1", (0, 9, "COOKING"))
    assert only(tmp_path)[1].noticed == {
        "sensor still ON at the end of its recording": 2,  # P3 and E2; one may switch on what another switches off
        "OFF of a sensor that was not ON": 1,
        "ON of a sensor that was ON already": 1,
    }


def test_a_recording_without_events_is_fine(tmp_path, instance):
    environment(instance)
    labels(instance, "1")
    events, report = only(tmp_path)
    assert events == [] and (report.recordings, report.groups, report.residents, report.events) == (1, 1, 1, 0)


# labels


def labelled(tmp_path, instance, *intervals, at=5, **options):
    environment(instance, ("R7", "ON", at, "1"), ("R7", "OFF", at, "1"))
    labels(instance, "1", *intervals)
    labels(instance, "2", (0, 99, "USING_PC"))  # of somebody else: plays no part
    (event, _), report = only(tmp_path, **options)
    return event.labels, report


@pytest.mark.parametrize(
    ("intervals", "label"),
    [
        ([(0, 9, "COOKING")], "COOKING"),
        ([(5, 9, "COOKING")], "COOKING"),  # both ends belong to the interval
        ([(0, 5, "COOKING")], "COOKING"),
        ([(5, 5, "COOKING")], "COOKING"),
        ([(9, 0, "COOKING")], "COOKING"),  # backwards
        ([(0, 4, "EATING"), (6, 9, "EATING"), (5, 6, "COOKING")], "COOKING"),
        ([(0, 9, "COOKING"), (4, 6, "TRANSITION")], "COOKING"),  # an activity beats TRANSITION
        ([(0, 9, "EATING"), (3, 6, "COOKING"), (2, 9, "EATING")], "COOKING"),  # the last to start
        ([(3, 6, "COOKING"), (0, 9, "EATING")], "COOKING"),
        ([(3, 9, "EATING"), (3, 6, "COOKING")], "COOKING"),  # the later row at a tie
    ],
)
def test_the_label_is_that_of_the_subjects_interval(tmp_path, instance, intervals, label):
    assert labelled(tmp_path, instance, *intervals)[0] == (label,)


def test_odd_intervals_are_counted(tmp_path, instance):
    _, report = labelled(
        tmp_path, instance, (9, 0, "COOKING"), (5, 5, "EATING"), (5, 5, "EATING"), (0, 9, "COOKING"), (20, 29, "EATING"), (29, 30, "EATING")
    )
    assert report.repaired == {"label interval that ends before it starts: ends swapped": 1}
    assert report.noticed == {
        "label interval of zero length": 2,
        "label interval given twice": 2,
        "label interval that starts before the one above it ends": 2,
        "event in intervals of different labels": 2,
    }


@pytest.mark.parametrize(
    ("intervals", "cause"),
    [([(0, 4, "COOKING"), (6, 9, "COOKING")], "outside its subject's label intervals"), ([(0, 9, "TRANSITION")], "TRANSITION")],
)
def test_unscored_events_stay_in_their_window(tmp_path, instance, intervals, cause):
    found, report = labelled(tmp_path, instance, *intervals)
    assert found == () and report.unscored == {cause: 2}
    assert (report.events, report.scored, report.labels, sum(report.windows.values())) == (2, 0, {}, 1)


def test_transition_is_a_label_if_asked(tmp_path, instance):
    found, report = labelled(tmp_path, instance, (0, 9, "TRANSITION"), transition="label")
    assert found == ("TRANSITION",) and report.unscored == {} and report.labels == {"TRANSITION": 2}
    offered = {option: read(f"marble:{tmp_path}", transition=option).homes[0].label_names for option in ("label", "ignore")}
    assert offered["label"] == tuple(ACTIVITIES) == (*offered["ignore"], "TRANSITION") and len(ACTIVITIES) == 14


def test_events_of_nobody_known_are_unscored(tmp_path, instance):
    environment(instance, ("R7", "ON", 0, "1"), ("R7", "OFF", 1, "3"), ("R7", "ON", 2, ""), ("R7", "OFF", 3, "2"))
    labels(instance, "1", (0, 9, "COOKING"))
    (instance / "subject-2").mkdir()  # a folder without labels.csv
    events, report = only(tmp_path)
    assert [event.labels for event in events] == [("COOKING",), (), (), ()]
    assert report.unscored == {"subject without labels.csv": 3} and report.residents == 3


# phones


def test_phones_are_merged_in_the_order_of_time_if_asked(tmp_path, instance):
    environment(instance, ("E2", "ON", 2, "1"), ("E2", "OFF", 7, "2"))
    labels(instance, "1", (0, 9, "MAKING_PHONE_CALL"))
    labels(instance, "2", (0, 9, "ANSWERING_PHONE"))
    labels(instance, "3", (0, 9, "EATING"))
    rows = [f'S1,"ON",{NOON + 1000}', f'S1,"OFF",{NOON + 8000}']
    csv(instance / "subject-1" / "smartphone.csv", "event_id,event_status,ts", *rows)
    csv(instance / "subject-2" / "smartphone.csv", "ts,event_id,event_status", f"{NOON + 2000},S2,ON", f"{NOON + 3000},S1,ON")
    (instance / "subject-3" / "smartphone.csv").write_bytes(b"\r\n")
    (instance / "subject-4").mkdir()
    (instance / "subject-4" / "smartphone.csv").write_bytes(b"")
    (instance / "subject-5").mkdir()
    (instance / "subject-5" / "smartphone.csv").write_bytes(b"\xef\xbb\xbf")
    assert len(only(tmp_path)[0]) == 2
    events, report = only(tmp_path, smartphone=True)
    assert [(event.id, event.description, event.resident, event.labels) for event in events] == [
        (0, "outgoing phone call started", "1", ("MAKING_PHONE_CALL",)),
        (1, "living room television turned ON", "1", ("MAKING_PHONE_CALL",)),
        (2, "incoming phone call started", "2", ("ANSWERING_PHONE",)),
        (3, "outgoing phone call started", "2", ("ANSWERING_PHONE",)),
        (4, "living room television turned OFF", "2", ("ANSWERING_PHONE",)),
        (5, "outgoing phone call ended", "1", ("MAKING_PHONE_CALL",)),
    ]
    assert report.noticed == {"sensor still ON at the end of its recording": 2}  # both of subject 2: each phone is one of its own
    rooms = [dict(read(f"marble:{tmp_path}", smartphone=asked).homes[0].rooms) for asked in (True, False)]
    assert "outgoing phone call" in rooms[0].pop("anywhere")[0] and rooms[0] == rooms[1]


# groups


def test_groups_share_a_person_and_a_day_transitively(tmp_path):
    for number, (subjects, day) in enumerate([("ab", 0), ("bc", 0), ("cd", 0), ("ab", 1), ("ef", 0), ("f", 1), ("g", 0)], 1):
        recording(tmp_path, f"A2m/instance{number}", subjects, 4, day)
    environment(tmp_path / "A2m" / "instance10", ("R7", "ON", DAY // 1000, "e"), ("R7", "OFF", DAY // 1000 + 1, "f"))
    groups = {it.id.removeprefix("A2m/instance"): it.group.removeprefix("A2m/instance") for it in read(f"marble:{tmp_path}").recordings()}
    assert groups == {"1": "1", "2": "1", "3": "1", "4": "4", "5": "5", "6": "6", "7": "7", "10": "6"}
    assert list(groups) == ["1", "2", "3", "4", "5", "6", "7", "10"]  # in the order of their numbers


def test_the_day_is_that_of_the_local_clock(tmp_path):
    for number, second in ((1, 10 * 3600), (2, 12 * 3600 + 60)):  # 22:00 and, past midnight, 00:01 UTC
        environment(tmp_path / "A1m" / f"instance{number}", ("R7", "ON", second, "1"))
    assert len({it.group for it in read(f"marble:{tmp_path}", utc_offset=0).recordings()}) == 2
    assert len({it.group for it in read(f"marble:{tmp_path}", utc_offset=2).recordings()}) == 1


# files at fault


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("environmental.csv", "sensor_id,sensor_status,ts\r\nR7,ON,5\r\n", "environmental.csv has no column 'subject_id'"),
        ("environmental.csv", "", "environmental.csv has no column 'sensor_id'"),
        (
            "environmental.csv",
            f"sensor_id,sensor_status,ts,subject_id\nR7,ON,{NOON},1\nR7,OFF,1e12,1\n",
            "environmental.csv, line 3: '1e12' is not",
        ),
        ("environmental.csv", "sensor_id,sensor_status,ts,subject_id\nR7,ON,,1\n", "environmental.csv, line 2: '' is not"),
        ("environmental.csv", "sensor_id,sensor_status,ts,subject_id\nR7,ON,1_0,1\n", "line 2: '1_0' is not"),
        ("environmental.csv", f"sensor_id,sensor_status,ts,subject_id\nR7,ON,{NOON}00,1\n", "line 2: '1599.*00' is not"),
        (
            "environmental.csv",
            f"sensor_id,sensor_status,ts,subject_id\nR7,OPEN,{NOON},1\n",
            "line 2: sensor_status is ON or OFF, not 'OPEN'",
        ),
        ("environmental.csv", "sensor_id,sensor_status,ts,subject_id\n\nR7,ON,5\n", "line 3: 3 cells where the first line names 4"),
        (
            "environmental.csv",
            'sensor_id,sensor_status,ts,subject_id\nR7,"ON,5,1\nR7,ON,6,1\n',
            "environmental.csv, line 3: unexpected end of data",
        ),
        ("environmental.csv", b"sensor_id,sensor_status,ts,subject_id\nR\xff,ON,5,1\n", "environmental.csv is not UTF-8"),
        ("subject-1/labels.csv", "ts_start,ts_end\n1,2\n", "labels.csv has no column 'act'"),
        ("subject-1/labels.csv", "ts_start,ts_end,act\n1,2,EATING\n1,2,DANCING\n", "labels.csv, line 3: unknown activity 'DANCING'"),
        ("subject-1/labels.csv", "ts_start,ts_end,act\n1,x,EATING\n", "labels.csv, line 2: 'x' is not"),
        ("subject-1/smartphone.csv", "event_id,ts\nS1,5\n", "smartphone.csv has no column 'event_status'"),
        ("subject-1/smartphone.csv", "\n\nS1,ON,5\n", "smartphone.csv has no column 'event_id': its first line names nothing"),
        ("subject-1/smartphone.csv", b"\xff", "smartphone.csv is not UTF-8"),
    ],
)
def test_a_fault_names_file_and_line(tmp_path, instance, name, content, message):
    recording(tmp_path, "B2e/instance1", "1", 2)
    (instance / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        only(tmp_path, smartphone=True)
    assert str(instance / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_recordings_or_without_sensor_file_is_told(tmp_path, instance):
    with pytest.raises(UserError, match="holds no <scenario>/<instance>/environmental.csv"):
        read(f"marble:{tmp_path}")
    labels(instance, "1", (0, 9, "COOKING"))
    with pytest.raises(UserError, match="environmental.csv cannot be read: No such file"):
        read(f"marble:{tmp_path}")


test_any_bytes = survives(
    "marble",
    {
        "A2a/instance1/environmental.csv": 'sensor_id,sensor_status,ts,subject_id\r\nR7,"ON",1544696860962,"201"\r\nR7,"OFF",1544696864000,"202"\r\n',
        "A2a/instance1/subject-201/labels.csv": "ts_start,ts_end,act\r\n1544696860000,1544696863000,COOKING\r\n1544696864000,1544696863000,TRANSITION\r\n",
        "A2a/instance1/subject-202/labels.csv": "ts_start,ts_end,act\r\n1544696860000,1544696873000,EATING\r\n",
    },
)
