"""A window as a request to a model, a completion as the labels of its events: the one way in which every door asks and reads."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from harkd.errors import UserError
from harkd.homes.answer import ANSWER_FORM, CUT_OFF, Answer, Text, answer_shape, parse_answer
from harkd.homes.dataset import Dataset
from harkd.homes.events import Home, Window
from harkd.homes.prompt import TEMPLATE_VERSION, prompt
from harkd.qwen3.template import chat, split_prefix
from harkd.sampling.request import BATCH, Request, Sampling

if TYPE_CHECKING:
    from harkd.distributed import World
    from harkd.sampling.generator import Completion, Generator


@dataclass(frozen=True)
class Machine:
    """Where a model runs, on how many windows at once, with how much room, in how many processes: nothing that changes what is asked."""

    device: str | None = None
    batch: int = BATCH
    cache_tokens: int | None = None  # as many as the free memory allows
    tensor_parallel: int = 1


def load_generator(
    model: str, adapter: str | None = None, dtype: str | None = None, machine: Machine = Machine(), group: World | None = None
) -> Generator:
    """The model with its adapter merged into it and its maps joined, or this process's part of a model, ready to write."""
    from harkd.qwen3.linear import join
    from harkd.qwen3.lora import merge
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.qwen3.weights import load_model
    from harkd.sampling.generator import Generator

    loaded = join(merge(load_model(model, machine.device, dtype, adapter, group)))
    return Generator(loaded, load_tokenizer(model), machine.batch, machine.cache_tokens)


def check_fit(model: str, requests: Iterable[Request], machine: Machine) -> None:
    """See, without the weights, that every request fits into the model's positions and the cache. Raises UserError."""
    from harkd.qwen3.cache import page_count
    from harkd.qwen3.config import read_config
    from harkd.qwen3.hub import resolve
    from harkd.qwen3.tokenizer import load_tokenizer
    from harkd.sampling.generator import PAGE
    from harkd.sampling.intake import Intake

    pages = math.inf if machine.cache_tokens is None else page_count(machine.cache_tokens, PAGE)
    positions = read_config(resolve(model)).max_position_embeddings
    intake = Intake(load_tokenizer(model), positions, pages, PAGE)
    for asked in requests:
        intake.open(asked)


@contextmanager
def _until_interrupted() -> Iterator[list[int]]:
    """A list that a first SIGINT fills, to let what runs end; the second stops at once, as ever."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before in (signal.SIG_IGN, None):  # who may not say what a signal does, or does not hear it
        yield noted
        return

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)
        print("interrupted: what was begun is finished; interrupt again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def completions(generator: Generator, asked: Iterable[tuple[Window, Request]]) -> Iterator[tuple[Window, Completion]]:
    """Each window with a completion, as they are finished. Interrupted, it begins no more, and raises KeyboardInterrupt behind the last.

    Of processes that hold one model together all stop where one of them is interrupted.
    """
    group = generator.model.group
    windows: dict[tuple[str, int], Window] = {}  # those whose completions are on their way
    with _until_interrupted() as interrupted:

        def requests() -> Iterator[Request]:
            for window, request in asked:
                if group.sum([len(interrupted)]) != [0]:
                    return
                windows[request.window, request.sample] = window
                yield request

        for done in generator.generate(requests()):
            yield windows.pop((done.request.window, done.request.sample)), done
    if group.sum([len(interrupted)]) != [0]:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Guiding:
    """Whether the answer's form is given and only the labels are chosen; `exact`: with the probabilities of all labels."""

    guided: bool = False
    exact: bool = False


def request(
    home: Home, window: Window, *, thinking: bool, sampling: Sampling, rules: bool = True, sample: int = 0, guiding: Guiding = Guiding()
) -> Request:
    """The rendered prompt of a window, split behind the prefix that all windows of the home share."""
    text = chat(prompt(home, window, rules=rules), thinking=thinking, generation_prompt=True)
    prefix, rest = split_prefix(text)
    shape = answer_shape(len(window.events), home.label_names) if guiding.guided else ()
    answer = tuple(part.text if isinstance(part, Text) else part.options for part in shape)
    return Request(window.id, rest, prefix, sample, sampling, answer, thinking, guiding.exact)


def probabilities(done: Completion, labels: Sequence[str]) -> list[dict[str, float]] | None:
    """Of a guided answer, {label: p} of each event to six digits; the labels that are not named share what lacks of 1 (see guide.py)."""
    return done.probabilities and [{labels[i]: float(f"{p:.6g}") for i, p in sorted(event.items())} for event in done.probabilities]


def read_answer(text: str, finish_reason: str, window: Window | int, labels: Sequence[str], *, normalise: bool = False) -> Answer:
    """The labels in a completion; one that was cut off by length answers nothing, whatever stands in it. `normalise`: see parse_answer."""
    if finish_reason == CUT_OFF:
        events = window if isinstance(window, int) else len(window.events)
        return Answer((None,) * events, {CUT_OFF: events})
    return parse_answer(text, window, labels, normalise=normalise)


def reread(record: Mapping[str, Any], labels: Sequence[str]) -> Sequence[str | None]:
    """The answer of a stored prediction with labels normalised, which may be no more than a misspelt one away from the strict answer.

    A baseline writes no text: its answer stands.
    """
    if "text" not in record:
        return record["answer"]
    return read_answer(record["text"], record["finish_reason"], len(record["truth"]), labels, normalise=True).labels


def mode(adapter: str | None, thinking: bool | None) -> bool:
    """Whether to reason: as asked for, else as the adapter was trained, else yes.

    Raises UserError where the adapter was trained with another prompt template, answer form or mode.
    """
    from harkd.qwen3.hub import ADAPTER_FILES, resolve
    from harkd.qwen3.lora import read_notes

    notes = read_notes(resolve(adapter, ADAPTER_FILES)) if adapter is not None else {}
    for name, here in (("template", TEMPLATE_VERSION), ("answer_form", ANSWER_FORM)):
        if notes.get(name, here) != here:
            there = f"the adapter {adapter} was trained with {name} {notes[name]!r}"
            raise UserError(f"{there}, and this version of harkd uses {here!r}: train it again")
    trained = notes.get("thinking")
    if None not in (trained, thinking) and trained != thinking:
        how = "with" if trained else "without"
        raise UserError(f"the adapter {adapter} was trained {how} reasoning: leave --thinking and --no-thinking out")
    return trained if trained is not None else thinking is not False


def first_windows(dataset: Dataset, split: str, limit: int | None) -> Iterator[Window]:
    """The windows of a split, the first `limit` of them. Raises UserError where there is none."""
    windows = islice(dataset.windows(split), limit)
    first = next(windows, None)
    if first is None:
        tell = f"`python -m harkd.homes {dataset.name}` tells what each split holds"
        raise UserError(f"the split {split!r} of {dataset.name} holds no window: {tell}")
    yield first
    yield from windows
