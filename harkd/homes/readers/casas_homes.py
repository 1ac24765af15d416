"""Where CASAS homes have their sensors, what a sensor's id says of its kind, and what values it may report.

Layouts follow the files of locations that CASAS gives out with its own software; sensors that they leave out have no room.
"""

from __future__ import annotations

import re

# by the letters of the id
KINDS = {"M": "motion", "MA": "area motion", "D": "door", "I": "item", "T": "temperature", "AD": "water or burner"}
KINDS |= {"L": "light", "LL": "light", "LS": "brightness", "BA": "battery", "P": "power"}
STATES = ("ON", "OFF", "OPEN", "CLOSE", "PRESENT", "ABSENT")
SLIPS = {"c": "M014"}  # an id that Aruba spells wrong
PSEUDO = ("ENTERHOME", "LEAVEHOME")  # Aruba: written by the annotator, no sensors

LAYOUTS = {  # home: room, place in it if there is one to tell, sensors
    "aruba": "bedroom: M001 M005 M006 M007; bedroom, bed: M002 M003; bathroom of the bedroom: M004; hall: M008; hall, closet: M031 D003; "
    "living room: M013 M020; living room, couch: M009 M010; living room, television: M012; dining room: M014; "
    "kitchen: M016 M017 M018 M019; kitchen, sink: M015; guest room: M021 M022 M023; guest bathroom: M024; office: M025 M026 M027 M028; "
    "hall bathroom: M029; entrance: M011; entrance, front: M030 D001; entrance, back: D002; entrance, garage: D004",
    "cairo": "office: M001; hall: M002 M003; stairs: M010; guest room: M004; bedroom: M005 M006 M007; bedroom, bed: M008 M009; "
    "living room: M011 M014 M016 M018 M023; living room, couch: M013 M017; kitchen: M012 M019 M022 M024; kitchen, dining table: M020; "
    "kitchen, medicine cabinet: M021; entrance: M015; entrance, garage: M027; laundry room: M026; other room: M025",
    "milan": "entrance: M001 M002 D001 D002; dining room, table: M003; living room: M005 M027; living room, armchair: M004; "
    "office: M006 M026; office, desk: M007; office, television: M008; hall: M009 M010 M011 M019 T002; kitchen: M012 M016 M023 T001; "
    "kitchen, medicine cabinet: M014; kitchen, fridge: M015; kitchen, stove: M022; kitchen, garage: D003; master bathroom: M013 M025; "
    "guest bathroom: M017 M018; master bedroom: M020 M028; master bedroom, bed: M021; guest bedroom: M024",
    # the apartment in Kyoto, also of twor and, without its upper floor, of adlmr
    "kyoto": "living room: M001 M003 M004 M005 M008 M011 M012 M013 M014 M015; living room, television: M002 D013; "
    "living room, couch: M006 M007; dining room: M009 M010; kitchen: M016 M017 M019 M051 I004 I006; kitchen, sink: M018; "
    "kitchen, closet: M020; kitchen, cabinet: D007 D014 D015 D016; kitchen, fridge: D008 D009; kitchen, microwave: D010; "
    "kitchen, pantry: D011; entrance: M021 M022 M023 M024 M025; entrance, closet: D012; stairs: M026; "
    "upper hall: M027 M028 M029 M030 M037 M042 M043; bathroom: M038 M039 M040 M041; bedroom 1: M033 M036; bedroom 1, desk: M031 M032; "
    "bedroom 1, bed: M034 M035; bedroom 2: M044 M045 M050; bedroom 2, desk: M048 M049; bedroom 2, bed: M046 M047",
}


def places(layout: str) -> dict[str, tuple[str, str]]:
    """Map each sensor of a layout to its (room, place), place "" for none; a layout that is not known has no sensors."""
    entries = (entry.partition(": ") for entry in LAYOUTS.get(layout, "").split("; "))
    return {sensor: (where.partition(", ")[0], where.partition(", ")[2]) for where, _, sensors in entries for sensor in sensors.split()}


def name_sensor(sensor: str, room: str, place: str) -> tuple[str, str]:
    """(room, name) in English: M006 at the couch is `couch motion M006`. A sensor of no known kind is named by its id, words apart."""
    match = re.fullmatch("([A-Z]+)[0-9]+.*", sensor)
    kind = KINDS.get(match[1], "") if match else ""
    return room, " ".join(f"{place if place != room else ''} {kind} {sensor if kind else words(sensor)}".split())


def words(name: str) -> str:
    """`KitchenAStove` as `kitchen a stove`."""
    return re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()


def read_state(sensor: str, value: str) -> str | None:
    """The value of a motion, door or item sensor freed from slips of the log (`ONc`, `OF`), None where it cannot be told (`O`)."""
    if value in STATES or not re.match("(M|MA|D|I)[0-9]", sensor):
        return value
    found = [state for state in STATES if value.upper().startswith(state) or len(value) > 1 and state.startswith(value.upper())]
    return found[0] if len(found) == 1 else None
