"""A home of one's own: events.csv and home.json."""

import json

from harkd.homes.dataset import read
from harkd.homes.prompt import system_message
from harkd.homes.readers import csv_home
from tests.reader_cases import events, faults, survives, told, write

HOME = {
    "name": "cottage",
    "rooms": {"kitchen": ["fridge (opened, closed)", "stove"], "hall": ["front door"]},
    "labels": {"COOKING": "prepares a warm meal", "EATING, or drinking": ""},
    "rules": ["The stove is for cooking only."],
}
EVENTS = """time,room,sensor,state,label,resident
2024-05-01 07:22:45,kitchen,fridge,opened,COOKING,ann
2024-05-01 07:22:46.25,kitchen,fridge,closed,"EATING, or drinking; COOKING",

2024-05-01T07:23:00,,doorbell,rang,DANCING,bob
2024-05-02 00:00:00, hall ,"front ""big"" door",opened,,bob
"""
FILES = {"home.json": json.dumps(HOME), "events.csv": EVENTS}


def test_events_and_days(tmp_path):
    dataset = read(f"csv:{write(tmp_path, FILES)}")
    assert told(dataset) == [
        ("07:22:45", "kitchen fridge opened", ("COOKING",), "ann"),
        ("07:22:46", "kitchen fridge closed", ("EATING, or drinking", "COOKING"), ""),
        ("07:23:00", "doorbell rang", (), "bob"),
        ("00:00:00", 'hall front "big" door opened', (), "bob"),
    ]
    assert [(it.id, it.group, it.residents) for it in dataset.recordings()] == [
        ("2024-05-01", "2024-05-01", ("ann", "bob")),
        ("2024-05-02", "2024-05-02", ("bob",)),
    ]
    assert dataset.survey().unscored == {"label 'DANCING', which home.json does not offer": 1, "no label": 1}


def test_the_prompt_tells_of_the_home(tmp_path):
    (home,) = read(f"csv:{write(tmp_path, FILES)}").homes
    text = system_message(home)
    assert "- kitchen: fridge (opened, closed), stove\n- hall: front door\n" in text
    assert "- COOKING: prepares a warm meal\n- EATING, or drinking\n" in text and "- The stove is for cooking only.\n" in text
    assert home.name == "cottage"


def test_labels_residents_and_rules_are_optional(tmp_path):
    home = {key: value for key, value in HOME.items() if key != "rules"}
    rows = "sensor,state,time,room\na,on,2024-05-01 00:00:00,b"
    dataset = read(f"csv:{write(tmp_path, {'home.json': json.dumps(home), 'events.csv': rows})}")
    assert told(dataset) == [("00:00:00", "b a on", (), "")] and dataset.survey().residents == 0


def test_recordings_that_share_a_day_form_a_group(tmp_path):
    rows = [("1", "a"), ("1", "b"), ("2", "b"), ("2", "c"), ("4", "d")]
    text = "recording,time,sensor,room,state\n" + "".join(f"{name},2024-05-0{day} 10:00:00,s,r,on\n" for day, name in rows)
    dataset = read(f"csv:{write(tmp_path, FILES | {'events.csv': text})}")
    assert {it.id: it.group for it in dataset.recordings()} == {"a": "a", "b": "a", "c": "a", "d": "d"}
    assert [len(events(dataset, name)) for name in "abcd"] == [1, 2, 1, 1]


def test_a_row_out_of_order_is_noticed(tmp_path):
    text = "time,sensor,room,state\n2024-05-01 10:00:00,s,r,on\n2024-05-01 09:00:00,s,r,off\n"
    assert read(f"csv:{write(tmp_path, FILES | {'events.csv': text})}").survey().noticed == {"event before the one above it": 1}


test_faults_of_events_are_told = faults(
    "csv",
    (FILES | {"events.csv": ""}, "events.csv, line 1: columns are time, sensor, room, state and, optional, label, resident, recording, each once, not none"),
    (FILES | {"events.csv": "time,sensor,room\n"}, "line 1: columns are time"),
    (FILES | {"events.csv": "time,sensor,room,state,mood\n"}, "each once, not time, sensor, room, state, mood"),
    (FILES | {"events.csv": "time,sensor,room,state,time\n"}, "line 1: columns are"),
    (FILES | {"events.csv": "time,sensor,room,state\n\n2024-05-01 10:00:00,s,r\n"}, "events.csv, line 3: 3 cells where the first line names 4"),
    (FILES | {"events.csv": "time,sensor,room,state\n2024-05-01 10:00:00Z,s,r,on\n"}, "line 2: '2024-05-01 10:00:00Z' is not a time YYYY-MM-DD HH:MM:SS"),
    (FILES | {"events.csv": 'time,sensor,room,state\n2024-05-01 10:00:00,"s,r,on\n'}, "events.csv, line 2: unexpected end of data"),
    (FILES | {"events.csv": b"time,sensor,room,state\n2024-05-01 10:00:00,\xff,r,on\n"}, "events.csv is not UTF-8 text: invalid start byte at byte 20 of"),
    (FILES | {"events.csv": EVENTS + "2024-05-01 23:00:00,hall,door,shut,,\n"}, "events.csv, line 7: the rows of recording '2024-05-01' do not stand"),
)


def changed(**changes) -> dict[str, str]:
    return FILES | {"home.json": json.dumps(HOME | changes)}


test_faults_of_the_home_are_told = faults(
    "csv",
    (changed(name=""), 'home.json, line 1: "name" is a text'),
    (changed(rooms=["kitchen"]), 'home.json, line 1: "rooms" maps each room'),
    (changed(rooms={"kitchen": "fridge"}), 'home.json, line 1: "rooms" maps each room'),
    (changed(labels={}), 'home.json, line 1: "labels" maps each activity'),
    (changed(labels={"COOKING": 5}), 'home.json, line 1: "labels" maps each activity'),
    (changed(labels=5), 'home.json, line 1: "labels" maps each activity'),
    (changed(rules="none"), 'home.json, line 1: "rules" is a list'),
    (changed(labels={"CAFÉ": "", "CAFE\u0301": ""}), "home.json, line 1: two activities are spelt with the same characters"),
    (changed(rooms={"kitchen": ["fridge \ud800"]}), "home.json, line 1: a text holds half of a surrogate pair"),
    ({}, "home.json cannot be read: No such file"),
    ({"home.json": FILES["home.json"]}, "events.csv cannot be read: No such file"),
    ({"home.json": "{\n,"}, "home.json, line 2: not JSON"),
)


def test_the_home_that_the_docstring_shows_is_read(tmp_path):
    shown = csv_home.__doc__.partition("home.json:\n")[2].partition("`rules`")[0]
    home = csv_home.read_home(write(tmp_path, {"home.json": shown}) / "home.json")
    assert home.label_names == ("COOKING", "EATING") and [room for room, _ in home.rooms] == ["kitchen", "hall"]


test_any_bytes = survives("csv", FILES)
