"""What `python -m harkd.train` was asked for, and the examples that it makes of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harkd.distill.select import MIN_AGREEMENT, select, yield_table
from harkd.errors import UserError
from harkd.homes.dataset import ReadOptions, group_digest, read
from harkd.homes.prompt import TEMPLATE_VERSION
from harkd.qwen3.config import PROJECTIONS
from harkd.recognition import first_windows

if TYPE_CHECKING:
    from harkd.distill.examples import TrainingExample
    from harkd.distill.traces import Trace
    from harkd.qwen3.tokenizer import Tokenizer

Grouped = TypeVar("Grouped")  # a trace or a window: it has a group
Truth = Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]  # window: labels on offer, true labels of each event


@dataclass(frozen=True)
class TrainSettings:
    """What to train on what. `traces` is a folder that generate wrote; with train_on "truth", `data` and `split` stand in for it."""

    model: str
    out: str
    traces: str | None = None
    train_on: str = "reasoning"
    keep: str = "correct"
    min_agreement: float = MIN_AGREEMENT
    cap: int | None = None
    data: str | None = None
    split: str = "train"
    limit: int | None = None
    rules: bool = True
    options: ReadOptions = ReadOptions()
    learn: str = "sequence"  # ways with commas, each with =WEIGHT where it is not 1; "on-policy" takes a share of the steps
    teacher: str | None = None
    teacher_top_k: int | None = None
    divergence: str = "forward_kl"
    beta: float = 0.5
    teacher_temperature: float = 1.0
    on_policy_fraction: float = 0.5
    lora_rank: int | None = None  # these two, epochs, batch_tokens and validation: where not asked for, the model decides, see train.py
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = PROJECTIONS
    lr: float | None = None  # 0.2 / the width of the model: 2e-4 at 0.6B
    epochs: int | None = None
    batch_tokens: int | None = None
    packs_per_step: int = 1
    validation: float | None = None
    validate_f1: int = 0
    patience: int = 0
    max_new_tokens: int | None = None
    seed: int = 0
    dtype: str | None = None

    @property
    def thinking(self) -> bool:
        return self.train_on == "reasoning"

    def ways(self) -> tuple[tuple[tuple[str, float], ...], float]:
        """The ways to learn with their weights, and the share of steps on-policy. Raises UserError where `learn` cannot be read."""
        weights: list[tuple[str, float]] = []
        for part in self.learn.split(","):
            name, given, weight = part.strip().partition("=")
            try:
                weights.append((name, float(weight) if given else 1.0))
            except ValueError:
                raise UserError(f"--learn {self.learn}: {weight!r} is not a number, write for instance sequence,labels=0.5") from None
            if name == "on-policy" and given:
                raise UserError(f"--learn {self.learn}: on-policy takes no weight, --on-policy-fraction says in how many of the steps")
        ways = tuple(pair for pair in weights if pair != ("on-policy", 1.0))
        return ways or (("sequence", 1.0),), self.on_policy_fraction if len(ways) < len(weights) else 0.0

    def check(self) -> None:
        """Raise UserError for what can be said of the settings before anything is read."""
        (weights, _), truth = self.ways(), self.train_on == "truth"
        ways, on_policy = dict(weights), "on-policy" in self.learn
        if truth and self.data is None:
            raise UserError("--train-on truth learns from a data set: name it with --data READER:PATH")
        if not truth and self.traces is None:
            raise UserError(f"--train-on {self.train_on} learns from traces: name the folder that harkd.generate wrote with --traces")
        if truth and "labels" in ways:
            raise UserError("--learn labels learns a teacher's probabilities, which the truth does not have: leave --train-on truth out")
        if self.teacher is None and ("logits" in ways or on_policy):
            raise UserError(f"--learn {self.learn} asks a teacher: name its model with --teacher")
        for name, holds, demand in (
            ("validation", 0 <= self.validation < 1, "at least 0 and below 1"), ("patience", self.patience >= 0, "at least 0"),
            ("min_agreement", 0 <= self.min_agreement <= 1, "between 0 and 1"), ("validate_f1", self.validate_f1 >= 0, "at least 0"),
            ("lora_alpha", 0 < self.lora_alpha < float("inf"), "above 0"),
            ("on_policy_fraction", 0 < self.on_policy_fraction <= 1, "above 0 and at most 1"),
        ):  # fmt: skip
            if not holds:
                raise UserError(f"--{name.replace('_', '-')} must be {demand}, not {getattr(self, name)}")
        self._check_idle(truth, "logits" in ways, on_policy)

    def _check_idle(self, truth: bool, logits: bool, on_policy: bool) -> None:
        """Raise UserError for a setting that these others leave without use."""
        given, usual = ({**vars(settings), **vars(settings.options)} for settings in (self, TrainSettings("", "")))
        for names, used, place in (
            (("data", "split", "limit", "rules", *vars(self.options)), truth, "--train-on truth, while the others learn from --traces"),
            (("traces", "keep", "min_agreement", "cap"), not truth, "--train-on reasoning and answer"),
            (("min_agreement",), self.keep in ("correct", "consistent"), "--keep correct and consistent"),
            (("teacher",), logits or on_policy, "--learn logits and on-policy"), (("on_policy_fraction",), on_policy, "--learn on-policy"),
            (("divergence", "beta", "teacher_temperature"), logits, "--learn logits"),
            (("teacher_top_k",), logits and not on_policy, "--learn logits without on-policy"),
            (("max_new_tokens",), on_policy or self.validate_f1, "--learn on-policy and --validate-f1"),
            (("patience",), self.validation, "--validation above 0"), (("beta",), self.divergence == "jsd", "--divergence jsd"),
        ):  # fmt: skip
            if idle := [name for name in names if given[name] != usual[name] and not used]:
                raise UserError(f"--{idle[0].replace('_', '-')} is for {place}: leave it out")


@dataclass(frozen=True)
class Lessons:
    """Examples to train and to validate on, and what goes with them.

    `asked`: with --validate-f1 one of each held-out window, for its prompt alone, and `truth` of these windows; `by_class`: (kept, of)
    traces; `notes`: template, data and digests of the groups that are trained on, for the adapter.
    """

    learn: list[TrainingExample]
    validate: list[TrainingExample]
    asked: list[TrainingExample]
    truth: Truth
    by_class: Mapping[str, tuple[int, int]]
    notes: Mapping[str, str | list[str]]


def lessons(settings: TrainSettings, tokenizer: Tokenizer) -> Lessons:
    """Read traces or windows, select, hold out, tokenise; what is left out is printed. Raises UserError where nothing is left to learn."""
    from harkd.distill.examples import examples_from_traces, examples_from_truth, template_of
    from harkd.distill.traces import read_traces

    counts: Counter[str] = Counter()
    by_class: Mapping[str, tuple[int, int]] = {}
    if settings.train_on == "truth":
        dataset = read(settings.data, settings.options)
        parts = hold_out(first_windows(dataset, settings.split, settings.limit), settings.validation, settings.seed)
        learn, validate = (examples_from_truth(dataset.homes, part, tokenizer, counts, rules=settings.rules) for part in parts)
        truth = {window.id: (dataset.home(window.home).label_names, [event.labels for event in window.events]) for window in parts[1]}
        template, names, asked = TEMPLATE_VERSION, [settings.data], validate
        source = {window.id: window for window in parts[0]}
    else:
        traces = list(read_traces(Path(settings.traces), counts))
        print(f"what --keep correct would keep of {len(traces)} traces, by --min-agreement:\n{yield_table(traces)}")
        selection = select(traces, settings.keep, settings.min_agreement, settings.cap)
        by_class = selection.by_class
        print(f"{selection.summary}; by class: {', '.join(f'{kept} of {of} {label}' for label, (kept, of) in by_class.items())}")
        if not selection.kept:
            raise UserError(f"{settings.traces} holds no trace to learn from: {selection.summary}")
        template = template_of(selection.kept)
        held_out = hold_out(traces, settings.validation, settings.seed)[1]  # of all: F1 also asks where the teacher was wrong
        groups, questions = {trace.group for trace in held_out}, {trace.window: _question(trace) for trace in held_out}
        parts = [[trace for trace in selection.kept if (trace.group in groups) == held] for held in (False, True)]
        learn, validate = (examples_from_traces(part, tokenizer, settings.train_on, counts) for part in parts)
        asked = examples_from_traces(questions.values(), tokenizer, settings.train_on)
        names, source = sorted({trace.data for trace in parts[0]}), {trace.window: trace for trace in parts[0]}
        truth = {trace.window: (trace.labels, trace.truth) for trace in held_out}
        ways = dict(settings.ways()[0])
        if learn and "labels" in ways and not any(example.choices for example in learn):
            raise UserError(f"{settings.traces} is without the probabilities that labels are learnt from: generate it with --guided")
        if list(ways) == ["labels"]:
            counts.update("without the probabilities of a guided answer" for e in (*learn, *validate) if not e.choices)
            learn, validate = ([example for example in part if example.choices] for part in (learn, validate))
    for cause, count in counts.items():
        print(f"{count} left out: {cause}")
    if not learn:
        causes = ", ".join(f"{count} {cause}" for cause, count in counts.items())
        raise UserError(f"there is no example to train on ({causes or 'all are held out for validation'})")
    groups = sorted({group_digest(source[example.window]) for example in learn})
    notes = {"template": template, "data": names, "groups": groups}
    return Lessons(learn, validate, asked if settings.validate_f1 else [], truth, by_class, notes)


def _question(trace: Trace) -> Trace:
    """A trace whose prompt alone counts: whatever the teacher wrote, an example can be made of it."""
    turn = {"role": "assistant", "reasoning_content": "-", "content": ""}
    return replace(trace, messages=[*trace.messages[:-1], turn], answer=[], probabilities=None)


def hold_out(items: Iterable[Grouped], fraction: float, seed: int) -> tuple[list[Grouped], list[Grouped]]:
    """Divide windows or traces into those to train on and those held out: whole groups of recordings, drawn by seed and name.

    round(fraction x groups) are held out, at least one where there are two groups, none for fraction 0.
    """
    items = list(items)
    groups = sorted({item.group for item in items}, key=lambda group: hashlib.sha256(f"{seed}:validation:{group}".encode()).digest())
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction else 0
    held_out = set(groups[:count])
    return [item for item in items if item.group not in held_out], [item for item in items if item.group in held_out]
