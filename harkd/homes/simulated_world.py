"""What the simulator knows of homes: rooms, things with sensors, activities, and the many names that each of them goes by.

A script is a line of steps: `fridge` is used and let go of within seconds, `couch+` begins, `couch-` ends, `20m` passes that many minutes
(half to one and a half times), `?` behind a step leaves it out half of the time.

The first word of a label tells what it stands for, one activity or the related ones that this home has a single label for, whatever the
home calls it: a small model, which reads from left to right, finds the label in a list by it.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Thing(NamedTuple):
    """Something with a sensor: its room, the kind of its sensor, and what homes call it."""

    room: str
    kind: str
    names: tuple[str, ...]


class Activity(NamedTuple):
    """When it is done (hour, probability a day), how (scripts, one of which is drawn), what homes call it, and what it means."""

    slots: tuple[tuple[float, float], ...]
    scripts: tuple[str, ...]
    names: tuple[str, ...]
    meaning: str


ROOMS = {
    "kitchen": ("kitchen", "cooking area"),
    "dining room": ("dining room", "dining area"),
    "living room": ("living room", "lounge"),
    "bedroom": ("bedroom", "sleeping room"),
    "bathroom": ("bathroom", "washroom"),
    "office": ("office", "study"),
    "hall": ("hall", "entrance", "corridor"),
}

KINDS = {  # the words for "on" and "off"
    "contact": (("opened", "closed"), ("open", "shut")),
    "power": (("turned ON", "turned OFF"), ("switched on", "switched off"), ("on", "off")),
    "pressure": (("occupied", "released"), ("pressed", "free")),
    "flow": (("running", "stopped"), ("flow started", "flow ended")),
    "motion": (("motion", "no motion"), ("active", "idle")),
}
MOTION_NAMES = ("motion sensor", "movement", "presence")

THINGS = {
    "fridge": Thing("kitchen", "contact", ("fridge", "refrigerator")),
    "cupboard": Thing("kitchen", "contact", ("cupboard", "food cabinet", "pantry")),
    "drawer": Thing("kitchen", "contact", ("drawer", "cutlery drawer", "dish drawer")),
    "stove": Thing("kitchen", "power", ("stove", "cooker", "hob")),
    "microwave": Thing("kitchen", "power", ("microwave", "oven")),
    "kettle": Thing("kitchen", "power", ("kettle", "water boiler", "coffee machine")),
    "sink": Thing("kitchen", "flow", ("sink", "sink tap")),
    "chair": Thing("dining room", "pressure", ("chair", "seat", "bench")),
    "couch": Thing("living room", "pressure", ("couch", "sofa", "armchair")),
    "tv": Thing("living room", "power", ("television", "TV set")),
    "console": Thing("living room", "power", ("game console", "video player")),
    "lamp": Thing("living room", "power", ("reading lamp", "floor lamp")),
    "bed": Thing("bedroom", "pressure", ("bed", "mattress")),
    "wardrobe": Thing("bedroom", "contact", ("wardrobe", "closet")),
    "toilet": Thing("bathroom", "flow", ("toilet", "toilet flush")),
    "basin": Thing("bathroom", "flow", ("basin", "washbasin")),
    "shower": Thing("bathroom", "flow", ("shower", "bathtub")),
    "cabinet": Thing("bathroom", "contact", ("medicine cabinet", "mirror cabinet")),
    "desk": Thing("office", "pressure", ("desk chair", "office chair")),
    "computer": Thing("office", "power", ("computer", "PC", "screen")),
    "coats": Thing("hall", "contact", ("coat closet", "shoe cabinet")),
    "door": Thing("hall", "contact", ("front door", "main door")),
}

# three lines each: name, "hour probability" of each slot, what it means; what homes call it; scripts. "wake" is the end of "sleep", and so
# labelled; "enter" is whenever somebody who left comes back
_TABLE = """\
wake | 6.8 1.0 |

    bed-
sleep | 22.8 1.0 | lies in bed at night until the morning
    sleeping, resting in bed, bed rest, slumber, night rest, dormancy
    bed+
toilet | 7.0 0.9, 11.0 0.5, 15.0 0.5, 19.0 0.6, 22.0 0.6 | uses the toilet, may wash hands behind it
    toileting, toilet visit, lavatory use, WC use, restroom visit, relief
    toilet basin?
wash | 7.2 0.9, 22.2 0.7 | takes a shower or washes at the basin
    showering, body care, hygiene, ablution, bathing, grooming
    shower+ 6m shower- basin?; basin+ 2m basin- cabinet?
medicine | 8.3 0.6, 21.0 0.6 | takes pills from the cabinet, then water
    medication, medicine intake, pills, tablets, treatment, drugs
    cabinet basin; cabinet basin cabinet?
dress | 7.6 0.9, 18.5 0.4 | takes clothes out
    dressing, clothes change, outfit change, attire, getting dressed, wardrobe use
    wardrobe wardrobe? bed?
breakfast | 7.8 0.95 | gets a meal ready in the morning
    breakfast preparation, morning cooking, early meal preparation, daybreak meal, sunrise cooking
    kettle+ fridge drawer? cupboard kettle-; fridge stove+ drawer 4m stove- fridge?; cupboard fridge microwave+ 2m microwave- drawer?
lunch | 12.2 0.9 | gets a meal ready at midday
    lunch preparation, midday cooking, noon meal preparation, luncheon, daytime cooking
    fridge stove+ cupboard drawer 8m sink? stove-; fridge cupboard microwave+ 3m microwave- drawer
dinner | 18.6 0.95 | gets a meal ready in the evening
    dinner preparation, evening cooking, supper preparation, late meal preparation, nightly cooking
    fridge cupboard stove+ drawer 9m fridge? stove-; cupboard stove+ sink 6m drawer stove-; fridge microwave+ 3m drawer microwave-
drink | 10.2 0.7, 16.2 0.8, 20.6 0.6 | makes or takes a drink between meals
    drinking, coffee or tea, beverage preparation, refreshment, tea time, thirst
    kettle+ drawer 2m kettle-; fridge drawer; kettle+ cupboard kettle-
eat | 8.1 0.9, 12.7 0.9, 19.1 0.95 | sits at the table and eats
    eating, meal at the table, dining, food intake, feeding, having a meal
    chair+ 12m chair-; chair+ 5m chair- chair+ 6m chair-
dishes | 8.5 0.6, 13.2 0.7, 19.6 0.8 | washes the dishes after a meal and puts them away
    dishwashing, washing up, cleaning dishes, scrubbing, rinsing dishes, crockery
    sink+ 3m sink- drawer; sink drawer sink+ 2m sink- drawer?
tv | 13.8 0.4, 17.4 0.4, 20.2 0.9 | sits on the couch with the television on
    watching television, viewing, TV time, screen time, television, broadcasts
    tv+ couch+ 40m couch- tv-; couch+ tv+ 30m tv- couch-; tv+ couch+ 15m couch- couch+ 15m couch- tv-
game | 14.8 0.5, 17.0 0.5, 21.0 0.4 | plays with the console on the television
    gaming, playing video games, console games, games, joystick, video games
    console+ tv+ couch+ 30m couch- console- tv-; tv+ console+ couch+ 25m console- couch- tv-
read | 10.6 0.4, 15.4 0.6, 21.4 0.5 | sits on the couch under the lamp
    reading, book reading, literature, novels, perusal, magazine reading
    lamp+ couch+ 25m couch- lamp-; couch+ lamp+ 30m lamp- couch-
work | 9.2 0.7, 13.6 0.6, 16.6 0.3 | sits at the desk
    working at the computer, PC work, desk work, office work, study, computer use
    desk+ computer+ 60m desk- desk+ 30m computer- desk-; computer+ desk+ 50m desk- computer-
leave | 8.9 0.5, 15.6 0.4 | takes a coat, then goes out of the door
    leaving home, going out, exit, outing, departure, stepping out
    coats door
enter |  | comes in at the door, then puts the coat away
    entering home, coming back, arrival, return, homecoming, back home
    door coats
"""


def _read(table: str) -> dict[str, Activity]:
    lines, found = table.splitlines(), {}
    for head, names, scripts in zip(lines[::3], lines[1::3], lines[2::3]):
        name, slots, meaning = map(str.strip, head.split("|"))
        pairs = tuple((float(hour), float(p)) for hour, p in map(str.split, filter(None, slots.split(", "))))
        found[name] = Activity(pairs, tuple(scripts.strip().split("; ")), tuple(filter(None, names.strip().split(", "))), meaning)
    return found


ACTIVITIES = _read(_TABLE)


class Merged(NamedTuple):
    """Activities that some homes have one label for: which, what homes call them, and what it means."""

    activities: tuple[str, ...]
    names: tuple[str, ...]
    meaning: str


MERGED = {
    "meal": Merged(("breakfast", "lunch", "dinner"), ("cooking", "catering", "kitchen work", "making a meal"), "gets any meal ready"),
    "care": Merged(
        ("wash", "toilet", "dress"),
        ("personal care", "self care", "freshening up", "bathroom use"),
        "uses the bathroom or takes clothes out",
    ),
    "leisure": Merged(("tv", "game", "read"), ("leisure", "relaxing", "entertainment", "pastime"), "spends time on the couch"),
    "table": Merged(("eat", "drink"), ("nourishment", "snacks and meals", "consuming", "nutrition"), "eats or drinks something"),
    "passage": Merged(("leave", "enter"), ("passage", "door use", "transit", "crossing"), "goes out or comes in"),
}


def first_word(label: str) -> str:
    """Of a label as a home spells it, with blanks or underscores."""
    return re.split("[ _]", label)[0]


_PLAIN = {first_word(name): key for key, known in (ACTIVITIES | MERGED).items() for name in known.names}


def plain(label: str) -> str:
    """The key in ACTIVITIES or MERGED that a label of any home stands for."""
    return _PLAIN[first_word(label)]


RULES = (
    "Each event has one activity: that of the person who caused it.",
    "Events next to each other may belong to different people.",
    "The time of day tells meals apart.",
    "What ends something belongs to the activity that began it.",
    "Look at what happens before and after in the same room.",
    "If unsure, give the likeliest activity.",
)
