"""The canonical answer, and the reading of what models write instead."""

import json
import sys
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harkd.homes.answer import NOT_WELL_FORMED, Answer, Choice, Text, answer_shape, canonical, label_spans, parse_answer
from harkd.homes.events import Event, Window

LABELS = ("COOKING", "WATCHING_TV", "EATING")
ODD_LABELS = ('say "hi"', "drinking water, coffee or drinks", "back\\slash", "[x] {y}", "café Ünïté", "a", "ab", "tab\there", "}]")


def parse(text: str, n: int = 2, labels=LABELS, **options) -> Answer:
    return parse_answer(text, n, labels, **options)


def item(number: object, activity: object) -> str:
    return json.dumps({"event_id": number, "activity": activity})


GOOD = '[{"event_id": 1, "activity": "COOKING"}, {"event_id": 2, "activity": "EATING"}]'
OTHER = canonical(["WATCHING_TV", "WATCHING_TV"])


# the canonical form


def test_canonical_is_the_documented_line():
    assert canonical(["COOKING", "EATING"]) == GOOD
    assert canonical([]) == "[]"
    assert canonical(["café \n"]) == '[{"event_id": 1, "activity": "café \\n"}]'


@given(st.lists(st.sampled_from(ODD_LABELS) | st.text(max_size=5), max_size=6))
def test_shape_spans_and_canonical_agree(labels):
    text = canonical(labels)
    assert [entry["activity"] for entry in json.loads(text)] == labels
    assert [text[start:end] for start, end in label_spans(labels)] == [json.dumps(label, ensure_ascii=False)[1:-1] for label in labels]
    options = tuple(dict.fromkeys(labels))
    shape = answer_shape(len(labels), options)
    chosen = iter(labels)
    assert "".join(part.text if isinstance(part, Text) else part.options[options.index(next(chosen))] for part in shape) == text
    assert [type(part) for part in shape] == ([Text, Choice] * len(labels) + [Text])


@given(st.lists(st.sampled_from(ODD_LABELS), max_size=12))
def test_canonical_is_read_back(labels):
    assert parse(canonical(labels), len(labels), ODD_LABELS) == Answer(tuple(labels), {})
    assert parse(f"<think>\nso [{{\n</think>\n\n{canonical(labels)}<|im_end|>", len(labels), ODD_LABELS).labels == tuple(labels)


# where the answer stands


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Here is the answer:\n{GOOD}\nI hope [this] {{helps}}.",
        f"```json\n{GOOD}\n```",
        f'{{"predictions": {GOOD}, "confidence": [0.5]}}',
        f"<think>\nMaybe {OTHER}? Or {{\n</think>\n\n{GOOD}",
        f"<think>\na\n</think>\n{OTHER}\n<think>\nb\n</think>\n{GOOD}",
        f"reasoning without an opening tag {OTHER}</think>{GOOD}",
        f"{OTHER}\nWait, I correct myself.\n{GOOD}",
        f"{GOOD}\nAs a check, the ids: [1, 2], [{{}}], [], [[]].",
        f'{GOOD}\nThe events were [{{"event_id": 1, "time": "12:00:00", "description": "x"}}]',
        f'[{{"event_id": 1, "activity": "EATING"\n{GOOD}',  # a broken draft before
        f'[{{"event_id": 1, "activity": "EATING"}}\n{GOOD}',
        f'{GOOD}\n[{{"event_id": 1, "activ',  # a broken second try after
        GOOD.replace(", {", ",\r\n\t{").replace(": ", ":"),
        '[{"activity": "COOKING", "event_id": 1, "why": null, "p": -1.5e3}, {"event_id": 2, "sure": true, "activity": "EATING"}]',
        GOOD.replace("COOKING", "\\u0043OOKING"),
        f"an odd \" quote and 5' before {GOOD}",
    ],
)
def test_finds_the_answer(text):
    assert parse(text) == Answer(("COOKING", "EATING"), {})


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (f"<think>{GOOD}</think>\n", "empty"),
        (f"<think>\nLet me see. {GOOD}", "unclosed_think"),
        (f"<think>a</think>{GOOD}<think>", "unclosed_think"),
        ("I do not know.", "no_list"),
        ("[]", "no_list"),
        ("[1, 2]", "no_list"),
        ('["COOKING", "EATING"]', "no_list"),
        (item(1, "COOKING"), "no_list"),
        ('[{"event_id": 1, "time": "12:00:00", "description": "echo"}]', "no_list"),
        (GOOD[:-1], "truncated"),
        (GOOD[:-10], "truncated"),
        (GOOD[:3], "truncated"),
        (GOOD[:50], "truncated"),
        (GOOD.replace('"', "'"), "malformed_list"),
        (GOOD[:-1] + ",]", "malformed_list"),
        (GOOD.replace('"event_id"', "event_id"), "malformed_list"),
        (GOOD.replace("1", "NaN"), "malformed_list"),
        (GOOD.replace("1", "Infinity"), "malformed_list"),
        (GOOD.replace("1", "01"), "malformed_list"),
        (GOOD.replace("COOKING", "COO\nKING"), "malformed_list"),
        (GOOD.replace("COOKING", "COO\\KING"), "malformed_list"),
        (GOOD.replace('"COOKING"', '["COOKING"]'), "malformed_list"),
        (GOOD.replace("}, {", "} {"), "malformed_list"),
        (GOOD.replace("}, {", "}, null, {"), "malformed_list"),
        (GOOD.replace("}, {", "}, // next\n{"), "malformed_list"),
    ],
)
def test_no_answer_at_all(text, cause):
    answer = parse(text)
    assert answer == Answer((None, None), {cause: 2})
    assert answer.malformed and cause in NOT_WELL_FORMED


def test_every_cut_of_an_answer_is_truncated():
    """A list cut off at any place gives nothing: what fits before the cut is not kept."""
    for end in range(2, len(GOOD)):
        assert parse(GOOD[:end]) == Answer((None, None), {"truncated": 2}), GOOD[:end]


# what the objects say


@pytest.mark.parametrize(
    ("items", "labels", "causes", "malformed"),
    [
        ([(2, "EATING"), (1, "COOKING")], ("COOKING", "EATING"), {}, False),
        ([(1, "COOKING")], ("COOKING", None), {"missing": 1}, False),
        ([(1, "COOKING"), (1, "EATING"), (2, "EATING")], ("COOKING", "EATING"), {"doubled_id": 1}, False),
        ([(1, "DANCING"), (1, "EATING"), (2, "EATING")], (None, "EATING"), {"unknown_label": 1, "doubled_id": 1}, False),
        ([(0, "EATING"), (1, "COOKING"), (2, "EATING"), (3, "EATING"), (-1, "EATING")], ("COOKING", "EATING"), {"unknown_id": 3}, False),
        ([(1, "cooking"), (2, "WATCHING TV")], (None, None), {"label_spelling": 2}, False),
        ([(1, " COOKING"), (2, "EATING.")], (None, None), {"label_spelling": 1, "unknown_label": 1}, False),
        ([(1, "")], (None, None), {"unknown_label": 1, "missing": 1}, False),
        ([("1", "COOKING"), (2, "EATING")], (None, "EATING"), {"id_not_integer": 1}, True),
        ([("1", "EATING"), (1, "COOKING"), (2, "EATING")], ("COOKING", "EATING"), {}, False),
        ([(1, None), (2, 3)], (None, None), {"no_activity": 2}, True),
        ([(True, "COOKING"), (2.0, "EATING"), (None, "EATING"), ("x", "EATING")], (None, None), {"no_id": 4, "missing": 2}, False),
        (
            [(1, "COOKING"), (10**5000, "EATING"), ("9" * 5000, "EATING")],
            ("COOKING", None),
            {"missing": 1, "unknown_id": 1, "no_id": 1},
            False,
        ),
        ([(1, "COOKING\ud800"), (2, "EATING")], (None, "EATING"), {"unknown_label": 1}, False),
    ],
)
def test_objects_are_read_strictly(items, labels, causes, malformed):
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else None
    if limit is not None:
        sys.set_int_max_str_digits(0)  # to write the huge number; it is read under the usual limit
    text = "[" + ", ".join(item(*pair) for pair in items) + "]"
    if limit is not None:
        sys.set_int_max_str_digits(limit)
    answer = parse(text)
    assert answer == Answer(labels, causes)
    assert answer.malformed is malformed


def test_normalise_accepts_other_spellings_and_counts_them():
    text = (
        "["
        + ", ".join([item("1", "COOKING"), item(2, "watching tv"), item("3", "Watching-TV"), item(4, "EATING"), item(5, "DANCING")])
        + "]"
    )
    assert parse(text, 5, normalise=True) == Answer(
        ("COOKING", "WATCHING_TV", "WATCHING_TV", "EATING", None), {"normalised": 3, "unknown_label": 1}
    )
    assert parse(text, 5) == Answer((None, None, None, "EATING", None), {"id_not_integer": 2, "label_spelling": 1, "unknown_label": 1})


def test_normalise_never_guesses_between_two_labels():
    labels = ("use pc", "USE_PC")
    assert parse(f"[{item(1, 'use pc')}, {item(2, 'Use Pc')}]", 2, labels, normalise=True) == Answer(
        ("use pc", None), {"label_spelling": 1}
    )


def test_a_window_stands_for_its_number_of_events():
    event = Event(0, datetime(2020, 1, 1), "fridge", "kitchen", "opened")
    window = Window("w", "h", "g", "r", (event, event))
    assert parse_answer(GOOD, window, LABELS).labels == ("COOKING", "EATING")


def test_a_label_is_the_same_composed_or_not():
    """A tokenizer turns text into NFC, so that no model can write the other form."""
    decomposed = "cafe\u0301"
    for labels, written in (((decomposed,), "caf\u00e9"), (("caf\u00e9",), decomposed), ((decomposed,), decomposed)):
        answer = parse_answer(canonical([written]), 1, labels)
        assert answer.labels == labels and answer.causes == {}
