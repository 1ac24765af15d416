"""What a model should write for a window, and what to make of what it did write.

Canonical form, on one line, strings escaped as JSON:   [{"event_id": 1, "activity": "COOKING"}, {"event_id": 2, "activity": "EATING"}]

Reading a completion:

1. The answer is what follows the last `</think>`. A `<think>` after that is a thought without an end: there is no answer.
2. An answer list is a JSON list of flat objects, at least one of which has both "event_id" and "activity". It may stand anywhere: between
   sentences, in a code fence, inside an object. The last whole one counts, since models correct themselves. Prose and other lists
   (an echo of the input has no "activity") are passed over.
3. Only strict JSON is read. A list that breaks off at the end of the text is `truncated`, any other broken list `malformed_list`; neither
   is salvaged, so a completion cut off by length scores nothing, as it should.
4. Of the objects with an event's number the first counts. The number is a JSON integer and the label is spelt as it is on offer; with
   `normalise` the number may be a string of digits, and case, blanks, underscores and hyphens in a label do not matter, unless that
   leaves more than one label.

The search is a regular expression over flat objects, so it takes linear time and no recursion, whatever the text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from harkd.homes.events import Window

ANSWER_FORM = "1"  # version of the canonical form
CUT_OFF = "length"  # finish reason, and the cause of an answer that never came to its end

# Causes of an event without an answer, beside "missing", "unknown_label" and "label_spelling"; each such event has exactly one.
# empty: nothing but white space; id_not_integer, no_activity: an object for the event has its number as a string, no activity or one that
# is not a string; CUT_OFF: by the model's limit of tokens, told by who ran it, not seen in the text
NOT_WELL_FORMED = ("empty", "unclosed_think", "no_list", "truncated", "malformed_list", "id_not_integer", "no_activity", CUT_OFF)
# Counted besides, at no event's cost: "doubled_id", "unknown_id", "no_id" (objects passed over), "normalised" (answers taken by leniency)


@dataclass(frozen=True)
class Text:
    """A stretch of the answer that is known before it is written."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A place in the answer where one of `options` stands: the labels in their order, escaped as in JSON, without the quotes."""

    options: tuple[str, ...]


def answer_shape(n_events: int, labels: Sequence[str]) -> list[Text | Choice]:
    """The canonical answer for `n_events` events as known text and choices in turn."""
    if n_events == 0:
        return [Text("[]")]
    choice = Choice(tuple(_escaped(label) for label in labels))
    shape: list[Text | Choice] = []
    for number in range(1, n_events + 1):
        shape += [Text(("[" if number == 1 else '"}, ') + f'{{"event_id": {number}, "activity": "'), choice]
    return [*shape, Text('"}]')]


def canonical(labels: Sequence[str]) -> str:
    """The answer that names `labels`, one per event."""
    return json.dumps([{"event_id": n, "activity": label} for n, label in enumerate(labels, 1)], ensure_ascii=False)


def label_spans(labels: Sequence[str]) -> list[tuple[int, int]]:
    """Where in canonical(labels) each label stands, as (start, end) in characters, quotes left out."""
    spans, end = [], 0
    for label, known in zip(labels, answer_shape(len(labels), ())[::2]):
        start = end + len(known.text)
        end = start + len(_escaped(label))
        spans.append((start, end))
    return spans


def _escaped(label: str) -> str:
    return json.dumps(label, ensure_ascii=False)[1:-1]


@dataclass(frozen=True)
class Answer:
    """One label per event of the window, None where there is no valid one; `causes` counts why, and what else was odd."""

    labels: tuple[str | None, ...]
    causes: dict[str, int]

    @property
    def malformed(self) -> bool:
        """Whether some event has no answer because the output was not well formed."""
        return any(self.causes.get(cause) for cause in NOT_WELL_FORMED)


def parse_answer(text: str, window: Window | int, labels: Sequence[str], *, normalise: bool = False) -> Answer:
    """The labels that a completion gives to the events of `window` (or to that many events). Never raises, whatever the text."""
    n_events = window if isinstance(window, int) else len(window.events)
    items, cause = _last_list(text)
    if items is None:
        return Answer((None,) * n_events, {cause: n_events} if n_events else {})
    causes: Counter[str] = Counter()
    given: dict[int, tuple[str | None, str]] = {}  # event: label and cause of the first object for it
    refused: set[int | None] = set()  # events with an object whose number is a string
    for item in items:
        number, as_text = _event_number(item.get("event_id"))
        if as_text and not normalise:
            refused.add(number)
        elif number is None:
            causes["no_id"] += 1
        elif not 1 <= number <= n_events:
            causes["unknown_id"] += 1
        elif number in given:
            causes["doubled_id"] += 1
        else:
            label, cause = _match_label(item.get("activity"), labels, normalise)
            given[number] = label, cause or ("normalised" if as_text else "")
    answers = [given.get(n, (None, "id_not_integer" if n in refused else "missing")) for n in range(1, n_events + 1)]
    causes.update(cause for _, cause in answers if cause)
    return Answer(tuple(label for label, _ in answers), dict(causes))


def _event_number(value: Any) -> tuple[int | None, bool]:
    """(number or None, whether it was written as a string)."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        return int(value), True
    return (value if type(value) is int else None), False  # True and 1.0 equal 1 in Python, and are no numbers of events


def _match_label(activity: Any, labels: Sequence[str], normalise: bool) -> tuple[str | None, str]:
    """(label on offer or None, cause or "")."""
    if not isinstance(activity, str):
        return None, "no_activity"
    same = [label for label in labels if normalize("NFC", label) == normalize("NFC", activity)]  # which is all that a tokenizer tells apart
    if same:
        return activity if activity in same else same[0], ""
    alike = [label for label in labels if _squash(label) == _squash(activity)]
    if normalise and len(alike) == 1:
        return alike[0], "normalised"
    return None, "label_spelling" if alike else "unknown_label"


def _squash(label: str) -> str:
    return re.sub(r"[\s_-]+", "", label).casefold()


_BLANK = r"[ \t\r\n]*"
_STRING = r'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"'
_VALUE = rf"(?:{_STRING}|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null)"
_PAIR = rf"{_STRING}{_BLANK}:{_BLANK}{_VALUE}"
_OBJECT = re.compile(rf"{_BLANK}\{{{_BLANK}(?:{_PAIR}(?:{_BLANK},{_BLANK}{_PAIR})*{_BLANK})?\}}{_BLANK}")
_OPENING = re.compile(rf"\[(?={_BLANK}\{{)")


def _integer(digits: str) -> int:
    return int(digits) if len(digits) < 10 else 0  # Python refuses to convert thousands of digits; 0 is no event's number either


_JSON = json.JSONDecoder(parse_int=_integer)


def _last_list(text: str) -> tuple[list[dict[str, Any]] | None, str]:
    """(objects of the last whole answer list, ""), or (None, why there is none)."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "unclosed_think"
    if not text.strip():
        return None, "empty"
    last_closing = max(text.rfind("]"), text.rfind("}"))
    found, cause, at = None, "no_list", 0
    while opening := _OPENING.search(text, at):
        at, whole = _scan_list(text, opening.end())
        if not whole:
            cause = "truncated" if at > last_closing else "malformed_list"
        else:
            items = _JSON.decode(text[opening.start() : at])
            found = items if any("event_id" in item and "activity" in item for item in items) else found
    return found, "" if found else cause


def _scan_list(text: str, at: int) -> tuple[int, bool]:
    """(where reading ended, whether that is the end of a whole list) of the list of flat objects whose `[` ends at `at`."""
    while match := _OBJECT.match(text, at):
        at = match.end()
        if text[at : at + 1] == "]":
            return at + 1, True
        if text[at : at + 1] != ",":
            break
        at += 1
    return at, False
