"""The chat template against golden strings, and against Qwen3's own Jinja template."""

import functools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from harkd.qwen3.template import chat, split_prefix
from tests.helpers import QWEN3, needs_qwen3


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, *reasoning):
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning[0]} if reasoning else {})}


TOOL = "<tool_response>x</tool_response>"
EMPTY = "<think>\n\n</think>\n\n"
GOLDEN = {
    "a prompt": ([system("S"), user("U")], "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"),
    "reasoning is stripped of line ends, the answer at its start only": (
        [user("U"), assistant("\n\nA\n", "\n\n R\n ")],
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n R\n \n</think>\n\nA\n<|im_end|>\n",
    ),
    "the last turn has an empty block": (
        [user("U"), assistant("A")],
        f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{EMPTY}A<|im_end|>\n",
    ),
    "reasoning inside the content": (
        [user("U"), assistant("x<think>\nR\n</think>\n\nA")],
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\nR\n</think>\n\nA<|im_end|>\n",
    ),
    "several ends: reasoning before the first, answer after the last": (
        [user("U"), assistant("R</think>lost</think>\nA")],
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\nR\n</think>\n\nA<|im_end|>\n",
    ),
    "an unclosed block is content": (
        [user("U"), assistant("<think>\nR")],
        f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{EMPTY}<think>\nR<|im_end|>\n",
    ),
    "reasoning_content '' leaves the content alone, None does not": (
        [user("U"), assistant("R</think>A", ""), user("V"), assistant("R</think>A", None)],
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nR</think>A<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n<think>\nR\n</think>\n\nA<|im_end|>\n",
    ),
    "turns before the last query lose their reasoning": (
        [user("U"), assistant("\nA", "R"), user("V")],
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n",
    ),
    "a tool's response is no query": (
        [user("U"), assistant("A", "R"), user(TOOL), assistant("B")],
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\nR\n</think>\n\nA<|im_end|>\n"
        f"<|im_start|>user\n{TOOL}<|im_end|>\n<|im_start|>assistant\n{EMPTY}B<|im_end|>\n",
    ),
    "after the query only the last turn has an empty block": (
        [user("U"), assistant("\nA"), assistant("B")],
        f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n\nA<|im_end|>\n<|im_start|>assistant\n{EMPTY}B<|im_end|>\n",
    ),
    "without a query no block": (
        [system("S"), assistant("A", "R"), system("T")],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>system\nT<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    messages, expected = GOLDEN[name]
    assert chat(messages) == chat(messages, thinking=False) == expected


def test_generation_prompt():
    prompt = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert chat([user("U")], generation_prompt=True) == prompt
    assert chat([user("U")], thinking=False, generation_prompt=True) == prompt + EMPTY


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "User", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user"}],
        [user(None)],
        [user(["x"])],
        [user("U"), assistant("A", 1)],
        [user("U"), {**assistant("A"), "tool_calls": [{"name": "f", "arguments": "{}"}]}],
    ],
)
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(ValueError):
        chat(messages)


def test_split_prefix():
    text = chat([system("S"), user("U"), user("V")])
    shared = "<|im_start|>system\nS<|im_end|>\n<|im_start|>"
    assert split_prefix(text) == (shared, text[len(shared) :])
    for messages in ([user("U"), user("V")], [system("S")], [user("U"), system("S")]):
        assert split_prefix(chat(messages)) == ("", chat(messages))


# Against Jinja

FRAGMENTS = ("<think>", "</think>", "<tool_response>", "</tool_response>", "\n", "\n\n", " ", "\t", "\r\n", "A", "R", '[{"id": 1}]', "é")
FRAGMENTS += ("<|im_start|>", "<|im_end|>", "system", "user\n", "{{ x }}", "{%- if %}", "'", "&lt;", "\\n", "\x00", "\u2028")


@functools.cache
def jinja_template():
    # as transformers compiles it
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(json.loads((QWEN3 / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"])


def assert_as_jinja(messages):
    for thinking in (True, False):
        for generation in (True, False):
            expected = jinja_template().render(messages=messages, add_generation_prompt=generation, enable_thinking=thinking)
            assert chat(messages, thinking=thinking, generation_prompt=generation) == expected, (messages, thinking, generation)
    assert chat(messages, generation_prompt=True) == jinja_template().render(messages=messages, add_generation_prompt=True)


def random_text(rng):
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(["", TOOL, "\n", "<think>\nR\n</think>\n\nA", "<tool_response>", "</tool_response>"])
    return "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 9)))


def random_conversation(rng):
    messages = []
    for _ in range(rng.randrange(1, 7)):
        message = {"role": rng.choice(["system", "user", "user", "assistant", "assistant"]), "content": random_text(rng)}
        if message["role"] == "assistant" and rng.random() < 0.6:
            message["reasoning_content"] = rng.choice([None, "", "\n", random_text(rng), random_text(rng)])
        messages.append(message)
    return messages


@needs_qwen3
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_is_jinja(name):
    assert_as_jinja(GOLDEN[name][0])


@needs_qwen3
def test_random_conversations_as_jinja():
    rng = random.Random(0)
    conversations = [random_conversation(rng) for _ in range(2000)]
    for messages in conversations:
        assert_as_jinja(messages)
    # the generator reaches what it is for
    firsts = {messages[0]["role"] for messages in conversations}
    assert firsts == {"system", "user", "assistant"}
    assert any(all(m["role"] != "user" for m in messages) for messages in conversations)
    assert sum(m["content"].count("</think>") > 1 for messages in conversations for m in messages) > 50
    assert sum(m == user(TOOL) for messages in conversations for m in messages) > 50


TEXT = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join) | st.text(max_size=12)
MESSAGE = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["system", "user"]), TEXT) | st.builds(
    assistant, TEXT, st.none() | TEXT
)


@needs_qwen3
@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGE, min_size=1, max_size=6))
def test_any_conversation_as_jinja(messages):
    assert_as_jinja(messages)
