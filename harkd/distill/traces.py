"""Traces: what a teacher wrote about a window, one JSON object a line in `traces.jsonl`, all that training needs.

    {"data": "marble:...", "home": ..., "group": ..., "recording": ..., "window": "marble/A2m/instance1/0003", "sample": 0,
     "labels": [on offer],
     "messages": [{"role": "system", "hash": ...}, {"role": "user", "content": ...},
                  {"role": "assistant", "reasoning_content": ..., "content": ...}],
     "answer": [per event a label or null], "causes": {cause: count}, "truth": [per event a list of labels], "agreement": 0..1 or null,
     "tokens": {"prompt": n, "completion": n}, "finish_reason": ..., "seed": ..., "model": ..., "thinking": true,
     "template": version, "answer_form": version,
     "guided": false, "probabilities": null or [per event {label: p}]}

    agreement = events answered with one of their true labels / scored events    (an event with a true label is scored; null if none is)
    probabilities = of a guided answer: the teacher's p of each label; what an event's lack of 1 is shared by the labels it does not name

The system text, the same for all windows of a home, is kept once, in `prompts.jsonl` beside it: {"hash": ..., "content": ...}.
Both files are append-only, and a record's system text is on the disk before the record is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from harkd.errors import UserError
from harkd.homes.prompt import text_hash
from harkd.jsonl import JsonLinesWriter, read_json_lines

TRACES, PROMPTS = "traces.jsonl", "prompts.jsonl"


@dataclass(frozen=True)
class Trace:
    """One sample of a teacher's answer to one window. The fields are those of the file; the system message holds its text."""

    data: str
    home: str
    group: str
    recording: str
    window: str
    sample: int
    labels: Sequence[str]
    messages: Sequence[Mapping[str, str]]
    answer: Sequence[str | None]
    causes: Mapping[str, int]
    truth: Sequence[Sequence[str]]
    agreement: float | None
    tokens: Mapping[str, int]
    finish_reason: str
    seed: int | None
    model: str
    thinking: bool
    template: str
    answer_form: str
    guided: bool = False  # absent in traces of older versions, as is the next
    probabilities: Sequence[Mapping[str, float]] | None = None


_FIELDS = tuple(field.name for field in fields(Trace))
_DEFAULTS = {field.name: field.default for field in fields(Trace) if field.default is not MISSING}


def agreement(answer: Sequence[str | None], truth: Sequence[Sequence[str]]) -> float | None:
    """The fraction of scored events that are answered with one of their true labels, None if no event is scored."""
    right = [label in true for label, true in zip(answer, truth, strict=True) if true]
    return sum(right) / len(right) if right else None


class TraceWriter:
    """Appends traces to a folder, and continues what a killed run left there.

    `done` holds the (window, sample) of every trace in the folder. Raises UserError where a line of the folder's files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._prompts = JsonLinesWriter(folder / PROMPTS)
        self._traces = JsonLinesWriter(folder / TRACES)
        self._hashes = set(_read_prompts(folder / PROMPTS))
        records = read_json_lines(folder / TRACES)
        self.done = {(_field(record, "window", folder / TRACES, n), _field(record, "sample", folder / TRACES, n)) for n, record in records}

    def write(self, trace: Trace) -> None:
        """Append one trace. ValueError if its window and sample are there already."""
        key = (trace.window, trace.sample)
        if key in self.done:
            raise ValueError(f"the trace {key} has been written already")
        record = {name: getattr(trace, name) for name in _FIELDS}
        record["messages"] = [self._stored(message) for message in trace.messages]
        self._traces.append(record)
        self.done.add(key)

    def _stored(self, message: Mapping[str, str]) -> Mapping[str, str]:
        """A message as the file has it: a system message by its hash, its text put into the sidecar where it is new."""
        if message["role"] != "system":
            return message
        digest = text_hash(message["content"])
        if digest not in self._hashes:
            self._prompts.append({"hash": digest, "content": message["content"]})
            self._hashes.add(digest)
        return {"role": "system", "hash": digest}

    def close(self) -> None:
        """Close both files."""
        self._prompts.close()
        self._traces.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_traces(path: Path, counts: Counter[str] | None = None) -> Iterator[Trace]:
    """The traces of a folder, or of a .jsonl file with its prompts.jsonl beside it, read one by one.

    Of several traces of one (window, sample) the first counts. `counts` is told of "doubled" ones and of a "torn" last line as reading
    goes on. Raises UserError for a missing file, at once; for a damaged line, a missing field or an unknown system text, when reading
    gets there.
    """
    path = Path(path)
    file = path / TRACES if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no traces: name a folder that harkd.generate wrote, or its {TRACES}")
    return _read(file, _read_prompts(file.parent / PROMPTS), Counter() if counts is None else counts)


def _read(file: Path, prompts: Mapping[str, str], counts: Counter[str]) -> Iterator[Trace]:
    seen: set[tuple[str, int]] = set()
    for number, record in read_json_lines(file, counts):
        trace = _trace(record, prompts, file, number)
        if (trace.window, trace.sample) in seen:
            counts["doubled"] += 1
            continue
        seen.add((trace.window, trace.sample))
        yield trace


def _trace(record: Mapping[str, Any], prompts: Mapping[str, str], file: Path, number: int) -> Trace:
    """Check one record and join its system text. Fields that are not known here are left aside."""
    record = {**_DEFAULTS, **record}
    values = {name: _field(record, name, file, number) for name in _FIELDS}
    try:
        roles = [message["role"] for message in values["messages"]]
        complete = roles[-1:] == ["assistant"] and all(isinstance(m["content"], str) for m in values["messages"] if m["role"] != "system")
        complete = complete and len(values["answer"]) == len(values["truth"]) and values["tokens"]["completion"] >= 0
        p = values["probabilities"]
        complete = complete and (p is None or (len(p) == len(values["answer"]) and all(x >= 0 for event in p for x in event.values())))
    except (TypeError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{file}, line {number}: messages, answer, truth, tokens or probabilities do not have the form of a trace")
    messages = []
    for message in values["messages"]:
        if message["role"] == "system":
            if message.get("hash") not in prompts:
                raise UserError(f"{file}, line {number}: its system text {message.get('hash')!r} is not in {file.parent / PROMPTS}")
            message = {"role": "system", "content": prompts[message["hash"]]}
        messages.append(message)
    return Trace(**{**values, "messages": messages})


def _read_prompts(path: Path) -> dict[str, str]:
    """The system texts of a sidecar by their hashes. UserError where the file is missing or a text was changed."""
    prompts = {}
    for number, record in read_json_lines(path):
        digest, content = _field(record, "hash", path, number), _field(record, "content", path, number)
        if not isinstance(content, str) or text_hash(content) != digest:
            raise UserError(f"{path}, line {number}: the text was changed, it does not have the hash {digest!r} any more")
        prompts[digest] = content
    return prompts


def _field(record: Mapping[str, Any], name: str, file: Path, number: int) -> Any:
    if name not in record:
        raise UserError(f"{file}, line {number}: the field {name!r} is missing")
    return record[name]
