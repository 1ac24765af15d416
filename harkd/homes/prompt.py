"""A window as the messages that a model sees, the same for every model.

The system message depends on the home alone, so all windows of a home share it as a prefix: role, home, input, output, activities, rules,
example. The user message is the window: a JSON list of events, one per line. Labels, residents and the names of recordings stay out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from harkd.errors import UserError
from harkd.homes.answer import canonical
from harkd.homes.events import Event, Home, Window

TEMPLATE_VERSION = "1"

# what a Qwen3 tokenizer turns into one special token: in a name from the data it would end the turn or open a thought
CONTROL = re.compile(r"<\|[^|<>\s]*\|>|</?(?:think|tool_call|tool_response)>")

_ROLE = (
    "You recognise human activities in a smart home from its ambient sensors. Several people may live there and act at the same time; "
    "the sensors do not tell who caused an event. For every sensor event, name the activity of the person who caused it."
)

_INPUT = (
    "A JSON list of consecutive sensor events, oldest first. Each event is an object with\n"
    '- "event_id": its number in the list\n'
    '- "time": local time, HH:MM:SS\n'
    '- "description": "<room> <sensor> <state>"'
)

_OUTPUT = (
    "A JSON list on one line, with one object per input event, in the same order. Each object has\n"
    '- "event_id": the number of the event\n'
    '- "activity": one of the activities below, spelt exactly as there\n'
    "The final answer is this list and nothing else."
)


def system_message(home: Home, *, rules: bool = True) -> str:
    """What a model is told of a home. The number of residents is ground truth, and is not told."""
    return joined(sections(home, rules=rules))


def sections(home: Home, *, rules: bool = True) -> list[tuple[str, str]]:
    """(title, text) of each part of a system message; the first has no title, and what a home does not have has no text."""
    return [
        ("", _ROLE),
        ("Rooms, with their sensors and appliances", "\n".join(f"- {room}: {', '.join(sensors)}" for room, sensors in home.rooms)),
        ("Input", _INPUT),
        ("Output", _OUTPUT),
        ("Activities", "\n".join(f"- {label.name}" + (f": {label.description}" if label.description else "") for label in home.labels)),
        ("Rules for ambiguous events", "\n".join(f"- {rule}" for rule in home.rules) if rules else ""),
        ("Example", _example(home.example) if home.example else ""),
    ]


def joined(sections: Iterable[tuple[str, str]]) -> str:
    """The message that these sections make."""
    return _checked("\n\n".join((f"# {title}\n" if title else "") + text for title, text in sections if text))


def user_message(window: Window) -> str:
    """The window's events as a JSON list, one per line, numbered from 1."""
    return _checked(_events_json(window.events))


def prompt(home: Home, window: Window, *, rules: bool = True) -> list[dict[str, str]]:
    return [{"role": "system", "content": system_message(home, rules=rules)}, {"role": "user", "content": user_message(window)}]


def text_hash(text: str) -> str:
    """16 hex digits that name a text, such as the system message of many traces."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _example(events: Sequence[Event]) -> str:
    return f"Input:\n{_events_json(events)}\nOutput:\n{canonical([event.labels[0] for event in events])}"


def _events_json(events: Sequence[Event]) -> str:
    shown = ({"event_id": n, "time": f"{event.time:%H:%M:%S}", "description": event.description} for n, event in enumerate(events, 1))
    return "[\n" + ",\n".join(json.dumps(event, ensure_ascii=False) for event in shown) + "\n]"


def _checked(text: str) -> str:
    found = CONTROL.search(text)
    if found:
        start = max(0, found.start() - 40)
        raise UserError(f"the data hold the control token {found[0]} near {text[start:found.end()]!r}: rename that sensor, state or label")
    return text
