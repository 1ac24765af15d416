"""Whatever a model writes, it is read without an exception, in time, and every lost event has one cause."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harkd.homes.answer import NOT_WELL_FORMED, Answer, canonical, parse_answer

LABELS = ("COOKING", "WATCHING_TV", "EATING")
GOOD = canonical(["COOKING", "EATING"])


def check(answer: Answer, n: int) -> None:
    assert len(answer.labels) == n
    assert all(label is None or label in LABELS for label in answer.labels)
    assert sum(answer.causes.get(cause, 0) for cause in (*NOT_WELL_FORMED, "missing", "unknown_label", "label_spelling")) == answer.labels.count(None)  # every lost event has exactly one cause
    assert all(count > 0 for count in answer.causes.values())


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        "\\",
        "'",
        "\n",
        " ",
        "1",
        "-0",
        "1e999",
        "NaN",
        "null",
        "\ud800",
        "\\ud800",
        "\x00",
    ]
    + ['"event_id"', '"activity"', '"event_id": 1', '"activity": "COOKING"', "[{", "}]", "```json", GOOD, canonical(["EATING"])]
)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(PIECES, max_size=30).map("".join), st.integers(0, 4), st.booleans())
def test_never_raises(text, n, normalise):
    check(parse_answer(text, n, LABELS, normalise=normalise), n)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_never_raises_on_mutated_answers(data):
    n = data.draw(st.integers(0, 4))
    text = canonical(data.draw(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(PIECES | st.just("")) + text[at + data.draw(st.integers(0, 8)) :]
    check(parse_answer(text, n, LABELS), n)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_read_is_what_strict_json_says(data):
    """On a text that is one JSON list of flat objects, an independent reading with json.loads gives the same labels."""
    entries = data.draw(
        st.lists(
            st.fixed_dictionaries(
                {"event_id": st.integers(-1, 4), "activity": st.sampled_from([*LABELS, "x", None])}, optional={"note": st.text(max_size=3)}
            ),
            min_size=1,
        )
    )
    text = json.dumps(entries, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 2])))
    first = {}
    for entry in json.loads(text):
        first.setdefault(entry["event_id"], entry["activity"])
    expected = tuple(first.get(n) if first.get(n) in LABELS else None for n in (1, 2, 3))
    assert parse_answer(text, 3, LABELS).labels == expected


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "unit",
    [
        "[",
        "[{",
        "]",
        '[{"',
        '[{"a":',
        '[{"a":"',
        '{"{":",",":',
        '[{":",",":',
        '"[{',
        "[ ",
        "\\",
        '"',
        "[{}",
        "[{},",
        '[{"a":1},',
        "<think",
        "</think>",
        "<think></think>",
    ]
    + [GOOD, GOOD[:-1], GOOD[:-1] + ",", '[{"event_id":1,"activity":"', '\\"[{\\"', '[{"\\\\', '["', "1", '[{"a":1' + "1" * 50],
)
def test_a_megabyte_is_read_in_time(unit):
    """Repeated openings, quotes and escapes are what makes a careless search quadratic or a recursive one overflow."""
    for text in (unit * (MEGABYTE // len(unit)), "[{" + unit * (MEGABYTE // len(unit)), '[{"a":"' + unit * (MEGABYTE // len(unit))):
        start = time.process_time()
        check(parse_answer(text, 3, LABELS), 3)
        assert time.process_time() - start < 2


@pytest.mark.parametrize("run", [" ", "1", "\n", "a"])
def test_a_megabyte_of_one_character_inside_a_list(run):
    text = run * MEGABYTE
    for opening in ("[", "[{", '[{"', '[{"a":', '[{"a":1', '[{"a":1,', '[{"a":"', '[{"a":1}', '[{"event_id": '):
        start = time.process_time()
        check(parse_answer(opening + text, 1, LABELS), 1)
        assert time.process_time() - start < 2
