"""From traces, or from the truth itself, to tokens that a student learns from.

    reasoning   thinking on:   prompt -> <think> the teacher's reasoning </think> the teacher's answer
    answer      thinking off:  prompt -> the teacher's answer
    truth       thinking off:  prompt -> the true labels

Answers are written again in the canonical form from their labels, so that a guided answer's skeleton is what was learnt.
With `truth`, an event without a true label (unscored) stays in the answer, which needs an entry for every event: it carries the label of
the nearest scored event, the one before it where there is one, and the characters of that label are masked from the loss. Of several true
labels the first is taken.

A trace of a guided answer holds the teacher's probabilities of the labels at each event. They become soft targets: along the tokens of the
label that was answered, wherever the labels that share the tokens so far go on differently, each next token with the probability of the
labels behind it, given the tokens so far. If answers are drawn by those probabilities, the divergences at an event's choices add up, in the
mean, to that between the distributions over whole labels.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from harkd.distill.traces import Trace
from harkd.errors import UserError
from harkd.homes.answer import canonical, label_spans
from harkd.homes.events import Home, Window
from harkd.homes.prompt import prompt
from harkd.qwen3.tokenizer import Example, Tokenizer, render_example


@dataclass(frozen=True)
class Choice:
    """Own token number `at` is one of `ids`, each with its probability, which is above 0; they sum to 1."""

    at: int
    ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class TrainingExample(Example):
    """Prefix, own tokens and mask of one example, the window it comes from (for messages), and what a teacher says to it.

    `top`: ids and logprobs [n, K] of a teacher's likeliest tokens at the n supervised ones.
    """

    window: str
    choices: tuple[Choice, ...] = ()
    top: tuple[Tensor, Tensor] | None = None


Examples = Sequence[TrainingExample]


def digest_into(digest: hashlib._Hash, examples: Iterable[TrainingExample]) -> None:
    """Feed a digest with all that examples consist of."""
    for example in examples:
        for values in ([len(example.prefix), len(example.ids)], example.prefix, example.ids, example.mask):
            digest.update(array("q", values).tobytes())
        digest.update(repr(example.choices).encode())
        for tensor in example.top or ():
            digest.update(tensor.contiguous().numpy())


def template_of(traces: Sequence[Trace]) -> str:
    """The one prompt template that all traces were written with. Raises UserError where they differ: an adapter learns one."""
    versions = sorted({trace.template for trace in traces})
    if len(versions) != 1:
        raise UserError(f"the traces were written with {len(versions)} prompt templates ({', '.join(versions)}): train on those of one")
    return versions[0]


def examples_from_traces(
    traces: Iterable[Trace], tokenizer: Tokenizer, train_on: str, counts: Counter[str] | None = None
) -> list[TrainingExample]:
    """Tokenise traces that `select` kept, for train_on "reasoning" or "answer".

    Traces without reasoning are left out of "reasoning", and counted in counts["without reasoning"]. Those with probabilities bring
    their choices.
    """
    thinking = train_on == "reasoning"
    prefixes: dict[tuple[int, ...], list[int]] = {}
    examples = []
    for trace in traces:
        reasoning = (trace.messages[-1].get("reasoning_content") or "").strip() if thinking else ""
        if thinking and not reasoning:
            if counts is not None:
                counts["without reasoning"] += 1
            continue
        turn = {"role": "assistant", "reasoning_content": reasoning, "content": canonical(trace.answer)}
        example = render_example(tokenizer, [*trace.messages[:-1], turn], thinking=thinking)
        made = _of_window(example, trace.window, prefixes)
        examples.append(replace(made, choices=_choices(tokenizer, trace, len(made.ids) - 1)) if trace.probabilities else made)
    return examples


def _choices(tokenizer: Tokenizer, trace: Trace, end: int) -> tuple[Choice, ...]:
    """The soft targets of an answer whose tokens end before own token `end`, as told at the top of this file."""
    own = tokenizer.encode(canonical(trace.answer))
    choices = []
    for event, given in enumerate(trace.probabilities):
        rest = (1 - sum(given.values())) / max(1, len(trace.labels) - len(given)) if given else 0.0  # of each label that is not named
        spelt = (canonical([*trace.answer[:event], label, *trace.answer[event + 1 :]]) for label in trace.labels if given)
        alive = [(tokenizer.encode(text), given.get(label, rest)) for text, label in zip(spelt, trace.labels)]
        at = 0
        while len(alive) > 1:
            following: Counter[int] = Counter()
            for ids, p in alive:
                following[ids[at]] += max(p, 0.0)
            total = sum(following.values())
            if len(following) > 1 and total > 0:
                shares = {id: p / total for id, p in following.items() if p > 0}
                choices.append(Choice(end - len(own) + at, tuple(shares), tuple(shares.values())))
            alive = [(ids, p) for ids, p in alive if ids[at] == own[at]]
            at += 1
    return tuple(choices)


def examples_from_truth(
    homes: Iterable[Home], windows: Iterable[Window], tokenizer: Tokenizer, counts: Counter[str] | None = None, *, rules: bool = True
) -> list[TrainingExample]:
    """Tokenise windows with their true answers.

    Windows without a scored event are left out, and counted in counts["without a scored event"].
    """
    by_name = {home.name: home for home in homes}
    prefixes: dict[tuple[int, ...], list[int]] = {}
    examples = []
    for window in windows:
        labels = true_answer(window)
        if labels is None:
            if counts is not None:
                counts["without a scored event"] += 1
            continue
        turn = {"role": "assistant", "reasoning_content": "", "content": canonical(labels)}
        unscored = [span for span, event in zip(label_spans(labels), window.events, strict=True) if not event.labels]
        messages = [*prompt(by_name[window.home], window, rules=rules), turn]
        example = render_example(tokenizer, messages, thinking=False, unscored=unscored)
        examples.append(_of_window(example, window.id, prefixes))
    return examples


def true_answer(window: Window) -> list[str] | None:
    """A label for every event of a window, as told at the top of this file; None if no event is scored."""
    known = [event.labels[0] if event.labels else None for event in window.events]
    nearest = next((label for label in known if label is not None), None)  # for the events before the first scored one
    if nearest is None:
        return None
    labels = []
    for label in known:
        nearest = label if label is not None else nearest
        labels.append(nearest)
    return labels


def _of_window(example: Example, window: str, prefixes: dict[tuple[int, ...], list[int]]) -> TrainingExample:
    """Name the window, and let the examples of one home hold one and the same prefix: thousands of copies would take gigabytes."""
    prefix = prefixes.setdefault(tuple(example.prefix), example.prefix)
    return TrainingExample(prefix, example.ids, example.mask, window)


def preview(example: Example, tokenizer: Tokenizer, prefix_chars: int = 300) -> str:
    """One example as the model sees it, what it learns standing between {+ and +}; of the shared prefix only both ends."""
    prefix = tokenizer.decode(example.prefix)
    if len(prefix) > 2 * prefix_chars:
        prefix = f"{prefix[:prefix_chars]}\n... ({len(example.prefix)} tokens of shared prefix) ...\n{prefix[-prefix_chars:]}"
    text, start = prefix, 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.mask[end] != example.mask[start]:
            part = tokenizer.decode(example.ids[start:end])
            text += f"{{+{part}+}}" if example.mask[start] else part
            start = end
    return f"{text}\n({len(example.prefix)} tokens shared, {len(example.ids)} own, {sum(example.mask)} learnt: those between {{+ and +}})"
