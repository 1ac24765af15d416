r"""Qwen3's chat template in plain Python: messages in, the text that the model sees out.

Every message becomes `<|im_start|>ROLE\nCONTENT<|im_end|>\n`. The rest is about an assistant's reasoning, and follows the Jinja template
of Qwen3's tokenizer_config.json to the character, tools left out:

- The reasoning is the message's `reasoning_content`. Where that is absent or None, the content is taken apart: the answer is what follows
  its last `</think>`, the reasoning what precedes its first, less anything up to a `<think>`.
- Only turns after the last query show it, as `<think>\nREASONING\n</think>\n\nCONTENT`. A query is a user's turn that is not wholly a
  <tool_response>. Without a query no turn shows it.
- Of those turns the last message always has a think block, an empty one if need be; the others have one only if they have reasoning.
- The generation prompt opens an assistant's turn. With thinking off it also holds an empty think block; with thinking on the model writes
  the block itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

START, END = "<|im_start|>", "<|im_end|>"
OPEN, CLOSE = "<think>", "</think>"
Message = Mapping[str, Any]


def chat(messages: Sequence[Message], *, thinking: bool = True, generation_prompt: bool = False) -> str:
    """Render a conversation. `thinking` matters to the generation prompt alone.

    ValueError on an empty conversation, a role other than system, user and assistant, a content that is not text, or tool calls.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    for message in messages:
        _check(message)
    last = len(messages) - 1
    last_query = max((i for i, message in enumerate(messages) if _is_query(message)), default=last)
    text = "".join(_turn(message, after_query=i > last_query, is_last=i == last) for i, message in enumerate(messages))
    if generation_prompt:
        text += f"{START}assistant\n" + ("" if thinking else f"{OPEN}\n\n{CLOSE}\n\n")
    return text


def split_prefix(text: str) -> tuple[str, str]:
    """Cut a rendered conversation into the part that all windows of a home share and the rest; ("", text) without a system turn.

    The cut lies after the second `<|im_start|>`: a special token, so both parts tokenised apart give the tokens of the whole.
    """
    second = text.find(START, len(START)) if text.startswith(f"{START}system\n") else -1
    cut = second + len(START) if second >= 0 else 0
    return text[:cut], text[cut:]


def _check(message: Message) -> None:
    if message.get("role") not in ("system", "user", "assistant"):
        raise ValueError(f"a message's role is system, user or assistant, not {message.get('role')!r}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"a message's content is text, not {message.get('content')!r}")
    if not isinstance(message.get("reasoning_content"), (str, type(None))):
        raise ValueError(f"a message's reasoning_content is text or None, not {message['reasoning_content']!r}")
    if message.get("tool_calls"):
        raise ValueError("tool calls are not supported")


def _is_query(message: Message) -> bool:
    content = message["content"]
    return message["role"] == "user" and not (content.startswith("<tool_response>") and content.endswith("</tool_response>"))


def _turn(message: Message, *, after_query: bool, is_last: bool) -> str:
    role, content = message["role"], message["content"]
    if role == "assistant":
        reasoning, content = _split_reasoning(message)
        if after_query and (is_last or reasoning):
            reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
            content = f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{content}"
    return f"{START}{role}\n{content}{END}\n"


def _split_reasoning(message: Message) -> tuple[str, str]:
    content, reasoning = message["content"], message.get("reasoning_content")
    if reasoning is not None:
        return reasoning, content
    if CLOSE not in content:
        return "", content
    parts = content.split(CLOSE)
    return parts[0].rstrip("\n").split(OPEN)[-1].lstrip("\n"), parts[-1].lstrip("\n")


def split_completion(text: str) -> tuple[str, str]:
    """(reasoning, answer) of what a model wrote.

    The answer follows the last `</think>`; a thought without an end has no answer behind it.
    """
    before, close, answer = text.rpartition(CLOSE)
    if OPEN in answer:  # a thought that was not closed
        before, close, answer = text, OPEN, ""
    if not close:
        return "", text
    return before.partition(OPEN)[2].strip("\n") if OPEN in before else before.strip("\n"), answer.lstrip("\n")
