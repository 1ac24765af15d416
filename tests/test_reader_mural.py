"""MuRAL in the form that its readers describe: no copy is at hand, so every file here is hand-written in that form."""

import json

import pytest

from harkd.homes.dataset import read
from harkd.homes.prompt import prompt
from tests.reader_cases import events, faults, survives, told, write

LABELS = (
    *("others", "using toilet", "preparing drinks", "preparing breakfast", "having breakfast", "personal washing"),
    *("bedroom personal activity", "grabing food or drinks", "resting on the couch or the chairs", "grabing tableware", "clearing table"),
    *("washing dishes", "watching TV", "reading books", "drinking water, coffee or drinks", "cleaning appartment", "taking shower"),
    *("playing video games", "getting out of the apartment", "coming into the apartment", "chatting", "treating fruits"),
    *("having fruits or snacks", "using pc", "preparing dinner", "having dinner", "playing board games"),
)
SENSORS = [  # name, type, location
    ("range hood wattmeter", "wattmeter", "kitchen"),
    ("induction stove wattmeter", "wattmeter", "kitchen"),
    ("coffee machine wattmeter", "wattmeter", "kitchen"),
    ("microwave oven wattmeter", "wattmeter", "kitchen"),
    ("kettle wattmeter", "wattmeter", "kitchen"),
    ("counter motion sensor", "PIR motion sensor", "kitchen"),
    ("cabinet door sensor", "magnetic contact sensor", "kitchen"),
    ("fridge door sensor", "magnetic contact sensor", "kitchen"),
    ("sink motion sensor", "motion sensor", "kitchen"),
    ("main door sensor", "magnetic contact sensor", "entrance"),
    ("chair_1 contact sensor", "magnetic contact sensor", "dining room"),
    ("chair_2 contact sensor", "magnetic contact sensor", "dining room"),
    ("chair_3 contact sensor", "magnetic contact sensor", "dining room"),
    ("food cabinet door sensor", "magnetic contact sensor", "dining room"),
    ("bookshelf motion sensor", "PIR motion sensor", "living room"),
    ("TV wattmeter", "wattmeter", "living room"),
    ("game console wattmeter", "wattmeter", "living room"),
    ("couch motion sensor", "PIR motion sensor", "living room"),
    ("toilet contact sensor", "magnetic contact sensor", "bathroom"),
    ("global motion sensor", "PIR motion sensor", "bathroom"),
    ("sink motion sensor", "PIR motion sensor", "bathroom"),
    ("door sensor", "magnetic contact sensor", "bedroom_1"),
    ("door sensor", "magnetic contact sensor", "bedroom_2"),
]
FIRST = """uid,time,sensor,action,Subject,Description,activity
0,23:58:45,bedroom_1 door,OPENED,A,"After getting up, A opens the door to bedroom_1.",6
1,23:58:49,bedroom_1 door,CLOSED,A,,6
2,23:59:10,bathroom global mov,turned ON,"A, B",They both wash,"5"
3,23:59:59,,,B,"B says ""hello"" to a guest",20
4,00:00:05,kitchen microwave,turned ON,B,,14
5,00:00:04,kitchen sink mov,turned OFF,B,,14
6,00:10:05,chair_2 contact,OPENED,"B,A",,"4, 14"
7,00:10:06,TV,turned ON,,,
8,12:10:06,garage lamp,,C,,0
"""
SECOND = """uid,time,sensor,action,Subject,Description,activity
0,07:22:45,kitchen induction stove wattmeter,turned OFF,A,Zanzibar,24
1,07:22:46,fridge door,OPENED,B,,7
"""
FILES = {
    "sensors.json": json.dumps([dict(zip(("sensor name", "sensor type", "sensor location"), sensor)) for sensor in SENSORS], indent=1),
    "activities.json": json.dumps([{"id": n, "name": name, "description": f"what {name} means"} for n, name in enumerate(LABELS)]),
    "01/data.csv": FIRST,
    "01/context.json": json.dumps({"day": "weekday", "resident number": 3, "roles": ["Wizard"], "scenario": "Moonparty"}),
    "02/data.csv": SECOND.replace("\n", "\r\n"),
    "floorplan.png": b"\x89PNG",
}


def test_events_of_a_session(tmp_path):
    dataset = read(f"mural:{write(tmp_path, FILES)}")
    assert told(dataset) == [
        ("23:58:45", "bedroom_1 door OPENED", ("bedroom personal activity",), "A"),
        ("23:58:49", "bedroom_1 door CLOSED", ("bedroom personal activity",), "A"),
        ("23:59:10", "bathroom global motion turned ON", ("personal washing",), "A, B"),
        ("00:00:05", "kitchen microwave turned ON", ("drinking water, coffee or drinks",), "B"),
        ("00:00:04", "kitchen sink motion turned OFF", ("drinking water, coffee or drinks",), "B"),
        ("00:10:05", "dining room chair 2 OPENED", ("having breakfast", "drinking water, coffee or drinks"), "B, A"),
        ("00:10:06", "living room tv turned ON", (), ""),
        ("12:10:06", "garage lamp", ("others",), "C"),
        ("07:22:45", "kitchen induction stove turned OFF", ("preparing dinner",), "A"),
        ("07:22:46", "kitchen fridge door OPENED", ("grabing food or drinks",), "B"),
    ]
    first = events(dataset, "01")
    assert [event.time.day for event in first] == [1, 1, 1, 2, 2, 2, 2, 2]  # past midnight once, and not for a second's disorder
    assert [event.id for event in first] == list(range(8))
    assert [(it.id, it.group, it.residents) for it in dataset.recordings()] == [("01", "01", ("A", "B", "C")), ("02", "02", ("A", "B"))]
    report = dataset.survey()
    assert report.noticed == {
        "row without a sensor: left out": 1,
        "row before the one above it": 1,
        "event of a sensor outside sensors.json": 1,
        "event without an action": 1,
    }
    assert report.unscored == {"row without an activity": 1} and report.repaired == {}


def test_all_labels_and_sensors_are_in_the_prompt_and_no_truth_is(tmp_path):
    dataset = read(f"mural:{write(tmp_path, FILES)}")
    (home,) = dataset.homes
    assert home.label_names == LABELS and len(LABELS) == 27
    assert {room: len(sensors) for room, sensors in home.rooms} == {
        **{"kitchen": 9, "entrance": 1, "dining room": 4, "living room": 4, "bathroom": 3, "bedroom_1": 1, "bedroom_2": 1}
    }
    text = "".join(message["content"] for window in dataset.windows() for message in prompt(home, window))
    assert all(f"- {label}: what {label} means" in text for label in LABELS)
    assert not any(word in text for word in ("A opens", "hello", "Zanzibar", "Wizard", "Moonparty", "weekday", "roles", "Subject"))


@pytest.mark.parametrize(
    ("name", "room", "sensor"),
    [
        ("kitchen sink mov", "kitchen", "sink motion"),
        ("Kitchen sink motion sensor", "kitchen", "sink motion"),
        ("bathroom_sink mov", "bathroom", "sink motion"),
        ("bedroom_2 door", "bedroom_2", "door"),
        ("main door", "entrance", "main door"),
        ("entrance main door", "entrance", "main door"),
        ("microwave", "kitchen", "microwave"),
        ("sink mov", "", "sink mov"),  # there are two
        ("door", "", "door"),
    ],
)
def test_shortened_names_are_joined_only_where_they_are_unique(tmp_path, name, room, sensor):
    row = f"uid,time,sensor,action,Subject,Description,activity\n0,07:00:00,{name},turned ON,A,,1\n"
    (event,) = events(read(f"mural:{write(tmp_path, FILES | {'01/data.csv': row})}"), "01")
    assert (event.room, event.sensor) == (room, sensor)


test_faults_are_told = faults(
    "mural",
    (FILES | {"01/data.csv": SECOND + "2,7:22,fridge door,OPENED,A,,1\n"}, "data.csv, line 4: '7:22' is not a time HH:MM:SS"),
    (FILES | {"01/data.csv": SECOND + "2,07:22:50,fridge door,OPENED,A,,27\n"}, "data.csv, line 4: '27' is no activity of activities.json"),
    (FILES | {"01/data.csv": SECOND + "2,07:22:50,fridge door,OPENED,A,1\n"}, "data.csv, line 4: 6 cells where the first line names 7"),
    (FILES | {"01/data.csv": "uid,time,sensor,action,Description,activity\n"}, "data.csv has no column 'Subject'"),
    (FILES | {"activities.json": "[{}]"}, "activities.json, entry 1 of the list: needs id, name, description"),
    (FILES | {"activities.json": "{}"}, "activities.json, line 1: should hold a JSON list"),
    (FILES | {"sensors.json": "[\n{"}, "sensors.json, line 2: not JSON"),
    (FILES | {"sensors.json": "[" * 100_000}, "sensors.json, line 1: not JSON"),
    ({}, "holds no <session>/data.csv"),
    ({"01/data.csv": FIRST}, "sensors.json cannot be read"),
)
test_any_bytes = survives("mural", {name: text for name, text in FILES.items() if name not in ("floorplan.png", "01/context.json")})
