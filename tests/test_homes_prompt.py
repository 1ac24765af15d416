"""What a model gets to see, and what it never does."""

import json
from dataclasses import replace
from datetime import datetime

import pytest

from harkd.errors import UserError
from harkd.homes.answer import canonical, parse_answer
from harkd.homes.dataset import read
from harkd.homes.events import Event, Home, Label, Window
from harkd.homes.prompt import TEMPLATE_VERSION, prompt, system_message, text_hash, user_message
from tests.helpers import MARBLE, QWEN3, needs_marble, needs_qwen3

FRIDGE = Event(7, datetime(2020, 1, 1, 7, 5, 9, 999_000), "fridge", "kitchen", "opened", ("Snack",), "Zoe")
HOME = Home(
    "villa",
    (("kitchen", ("fridge", "tap (on, off)")), ("hall", ("door",))),
    (Label("Snack", "eats a little"), Label('say "hi", again')),
    ("rule one",),
    (FRIDGE, replace(FRIDGE, labels=('say "hi", again',))),
)
WINDOW = Window("villa/rec9/0000", "villa", "group5", "rec9", (FRIDGE, replace(FRIDGE, id=8, room="", sensor="door", state="öpen")))


def test_user_message_is_one_json_object_per_line():
    text = user_message(WINDOW)
    assert text == (
        '[\n{"event_id": 1, "time": "07:05:09", "description": "kitchen fridge opened"},\n'
        '{"event_id": 2, "time": "07:05:09", "description": "door öpen"}\n]'
    )
    assert len(json.loads(text)) == 2


def test_system_message_holds_its_sections_in_order():
    text = system_message(HOME)
    parts = [
        "Several people",
        "- kitchen: fridge, tap (on, off)",
        "- hall: door",
        '"time"',
        '"activity"',
        "- Snack: eats a little",
        '- say "hi", again\n',
    ]
    parts += ["- rule one", "# Example\nInput:\n[\n", canonical(["Snack", 'say "hi", again'])]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text == text.strip() and text.endswith("}]")


def test_other_words_need_another_version():
    """Adapters and traces know their prompt by TEMPLATE_VERSION alone: who changes the words counts it up and pins the new hashes here."""
    pinned = {"1": ("b542c8a95c59d22f", "c22f18d79995a5d9")}
    assert (text_hash(system_message(HOME)), text_hash(user_message(WINDOW))) == pinned[TEMPLATE_VERSION]


def test_the_example_is_in_the_form_that_is_asked_for():
    given, answered = system_message(HOME).split("# Example\nInput:\n")[1].split("\nOutput:\n")
    assert given == user_message(Window("", "", "", "", HOME.example))
    assert parse_answer(answered, len(HOME.example), HOME.label_names).labels == ("Snack", 'say "hi", again')
    assert canonical(parse_answer(answered, 2, HOME.label_names).labels) == answered


def test_parts_are_left_out_where_there_is_nothing_to_say():
    assert "rule" not in system_message(HOME, rules=False)
    assert "Example" not in system_message(replace(HOME, example=()))
    assert "number of people" not in system_message(HOME)
    assert "Zoe" not in system_message(HOME)


def test_prompt_is_the_two_messages():
    assert prompt(HOME, WINDOW) == [{"role": "system", "content": system_message(HOME)}, {"role": "user", "content": user_message(WINDOW)}]
    assert prompt(HOME, WINDOW, rules=False)[0]["content"] == system_message(HOME, rules=False)


def test_truth_does_not_reach_the_prompt():
    """Whatever is ground truth may change, and the prompt stays the same."""
    hidden = replace(
        WINDOW, id="x", group="y", recording="z", events=tuple(replace(event, labels=(), resident="", id=0) for event in WINDOW.events)
    )
    assert prompt(HOME, hidden) == prompt(HOME, WINDOW)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "</tool_call>", "<tool_response>"])
def test_control_tokens_in_the_data_are_refused(token):
    for field in ("sensor", "room", "state"):
        with pytest.raises(UserError, match="control token"):
            user_message(replace(WINDOW, events=(replace(FRIDGE, **{field: f"a {token}b"}),)))
    for home in (
        replace(HOME, labels=(Label(f"x{token}"),)),
        replace(HOME, labels=(Label("x", token),)),
        replace(HOME, rooms=((token, ()),)),
        replace(HOME, rooms=(("hall", (token,)),)),
        replace(HOME, rules=(token,)),
    ):
        with pytest.raises(UserError, match="control token"):
            system_message(home)


def test_harmless_brackets_are_not_refused():
    assert "a < b | <c> <|> <| d |>" in user_message(replace(WINDOW, events=(replace(FRIDGE, sensor="a < b | <c> <|> <| d |>"),)))


def test_hash_names_a_text():
    assert text_hash("abc") == "ba7816bf8f01cfea"  # the known SHA-256 of "abc"
    assert text_hash("é") != text_hash("e")


# on the real recordings


@needs_marble
def test_real_prompts_share_the_system_message_and_hold_no_truth():
    dataset = read(f"marble:{MARBLE}", transition="label", smartphone=True)
    home = dataset.homes[0]
    systems = set()
    for window in dataset.windows():
        system, user = (message["content"] for message in prompt(home, window))
        systems.add(system)
        secrets = {window.home, window.recording, window.group, *window.recording.split("/"), *home.label_names}
        secrets |= {event.resident for event in window.events} | {"subject", "resident"}
        text = "".join(entry["description"] for entry in json.loads(user))
        assert not [secret for secret in secrets if secret in text]
        assert [set(entry) for entry in json.loads(user)] == [{"event_id", "time", "description"}] * len(window.events)
        assert not [secret for secret in (window.recording, *(event.resident for event in window.events)) if secret in system]
    assert len(systems) == 1


@needs_marble
def test_the_example_is_none_of_the_real_events():
    dataset = read(f"marble:{MARBLE}")
    home = dataset.homes[0]
    real = {(f"{event.time:%H:%M:%S}", event.description) for window in dataset.windows() for event in window.events}
    example = [(f"{event.time:%H:%M:%S}", event.description) for event in home.example]
    assert not real & set(example) and len(real) > 600
    sequence = [description for _, description in example]
    for recording in dataset.recordings():
        told = [event.description for event in recording.events()]
        assert all(told[at : at + len(sequence)] != sequence for at in range(len(told)))


@needs_marble
@needs_qwen3
def test_real_prompts_have_the_length_that_harkd_is_designed_for():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
    for options in ({}, {"transition": "label", "smartphone": True}):
        dataset = read(f"marble:{MARBLE}", **options)
        for rules in (True, False):
            assert 600 <= len(tokenizer.encode(system_message(dataset.homes[0], rules=rules)).ids) <= 1200
        assert max(len(tokenizer.encode(user_message(window)).ids) for window in dataset.windows()) <= 350
    assert len(tokenizer.encode(canonical(["COOKING"] * 10)).ids) <= 170
