"""Prompts out to a teacher that runs elsewhere, and its completions back in: the batch files of OpenAI-style servers,
one JSON object a line.

    out  {"custom_id": "WINDOW#SAMPLE", "method": "POST", "url": "/v1/chat/completions", "body": {"model", "messages", "temperature", ...}}
    in   {"custom_id": ..., "response": {"body": {"choices": [{"message": {"content", "reasoning_content"}, "finish_reason"}],
                                                       "usage": {...}}}, "error": null}

The form is that of the batch runners of OpenAI and vLLM. Beyond OpenAI's own, vLLM's fields `top_k`, `min_p` and `chat_template_kwargs`
(enable_thinking) are written.
Reasoning may come back in `reasoning_content` (or `reasoning`) or inside the content, between <think> and </think>.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harkd.errors import UserError
from harkd.files import replacing
from harkd.homes.events import Window
from harkd.jsonl import read_json_lines
from harkd.qwen3.template import CLOSE, OPEN
from harkd.sampling.request import Sampling

Completion = tuple[str, str, dict[str, int]]  # text, finish reason, tokens


def write_prompts(
    path: Path, work: Iterable[tuple[Window, int, list[dict[str, str]]]], model: str, thinking: bool, sampling: Sampling
) -> int:
    """Write one request per (window, sample, messages), whole or not at all. Returns how many."""
    body = {
        "model": model, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p, "presence_penalty": sampling.presence_penalty, "max_tokens": sampling.max_new_tokens,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }  # fmt: skip
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for window, sample, messages in work:
            one = {**body, "messages": messages, "seed": sampling.seed + sample}
            line = {"custom_id": f"{window.id}#{sample}", "method": "POST", "url": "/v1/chat/completions", "body": one}
            file.write(json.dumps(line).encode() + b"\n")
            count += 1
    return count


def read_completions(path: Path) -> dict[tuple[str, int], Completion]:
    """The completions of a batch's output file by (window, sample); of several for one prompt the first counts.

    Failed requests are counted on stderr. Raises UserError naming the line that does not have the form.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} with completions")
    completions: dict[tuple[str, int], Completion] = {}
    failed = 0
    for number, record in read_json_lines(path):
        window, _, sample = str(record.get("custom_id")).rpartition("#")
        if not window or not sample.isascii() or not sample.isdigit():
            raise UserError(f"{path}, line {number}: custom_id {record.get('custom_id')!r} is not of the form WINDOW#SAMPLE")
        response = record.get("response") if isinstance(record.get("response"), dict) else {}
        body = response.get("body")
        if record.get("error") or not body or response.get("status_code", 200) != 200:  # OpenAI's has the error in its body
            failed += 1
            continue
        completions.setdefault((window, int(sample)), _completion(body, path, number))
    if failed:
        print(f"{path}: {failed} requests failed and have no answer", file=sys.stderr)
    return completions


def _completion(body: Mapping[str, Any], path: Path, number: int) -> Completion:
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        reasoning, content = message.get("reasoning_content") or message.get("reasoning") or "", message.get("content") or ""
        tokens = {"prompt": int(usage.get("prompt_tokens") or 0), "completion": int(usage.get("completion_tokens") or 0)}
        finish_reason = str(choice.get("finish_reason") or "stop")
        text = f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n" + content if reasoning else content
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON can hold, is no text
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}, line {number}: the response does not have the form of a chat completion ({error!r})") from None
    return text, finish_reason, tokens
