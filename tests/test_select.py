"""Which traces are kept, and what becomes of them as examples."""

from collections import Counter
from datetime import datetime

import pytest

from harkd.distill.examples import examples_from_traces, examples_from_truth, preview, template_of, true_answer
from harkd.distill.select import consistency, select, yield_table
from harkd.errors import UserError
from harkd.homes.events import Event, Home, Label, Window
from harkd.lessons import TrainSettings
from harkd.qwen3.tokenizer import read_tokenizer
from tests.distill_cases import make_trace
from tests.tiny import tiny_tokenizer

RIGHT, HALF, WRONG = ("COOKING", "EATING"), ("COOKING", "COOKING"), ("EATING", "COOKING")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def tokens(n):
    return {"prompt": 90, "completion": n}


TRACES = [
    make_trace("a", 0, RIGHT, tokens=tokens(50)),
    make_trace("a", 1, RIGHT, tokens=tokens(40)),
    make_trace("a", 2, RIGHT, tokens=tokens(40)),
    make_trace("b", 0, WRONG),
    make_trace("b", 1, HALF),
    make_trace("c", 0, ("COOKING", None)),
    make_trace("c", 1, RIGHT, finish_reason="length"),
    make_trace("d", 0, HALF, truth=((), ())),
]


def ids(selection):
    return [(trace.window, trace.sample) for trace in selection.kept]


def test_correct_keeps_every_sample_that_agrees_enough():
    selection = select(TRACES)
    assert ids(selection) == [("a", 0), ("a", 1), ("a", 2)]
    unusable = {"without a label for every event": 1, "cut off by length": 1, "without truth to agree with": 1}
    assert selection.dropped == {"agreement below 0.8": 2, **unusable}
    assert "kept 3 of 8 traces (dropped: 1 without a label for every event, 1 cut off by length, 1 without truth to agree with, 2 " in selection.summary
    assert TrainSettings("", "").min_agreement == 0.8  # as a door has it
    assert ids(select(TRACES, "correct", 0.5)) == [("a", 0), ("a", 1), ("a", 2), ("b", 1)]


def test_best_keeps_one_usable_sample_of_each_window():
    selection = select(TRACES, "best")
    assert ids(selection) == [("a", 1), ("b", 1), ("d", 0)]
    assert selection.dropped["not the best of their window"] == 3
    assert ids(select(reversed(TRACES), "best")) == [("d", 0), ("b", 1), ("a", 1)]  # whatever the order


def test_all_keeps_what_is_usable():
    assert ids(select(TRACES, "all")) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("d", 0)]


ON, OFF = ("COOKING", "EATING", "EATING", "EATING"), ("COOKING", "EATING", "EATING", "COOKING")
UNLABELLED = ((),) * 4


def test_consistent_keeps_the_samples_that_agree_with_the_others_of_their_window():
    samples = [make_trace("a", n, answer, truth=UNLABELLED) for n, answer in enumerate((ON, ON, OFF))]
    traces = [*samples, make_trace("a", 3, ("COOKING", None, None, None), truth=UNLABELLED), make_trace("b", 0, ON, truth=UNLABELLED)]
    assert [consistency(trace, samples) for trace in samples] == [7 / 8, 7 / 8, 6 / 8] and consistency(traces[4], traces[4:]) is None
    unusable = {"without a label for every event": 1, "without another sample to agree with": 1}
    for least, kept in ((1.0, []), (0.8, [("a", 0), ("a", 1)]), (0.75, [("a", 0), ("a", 1), ("a", 2)])):
        selection = select(traces, "consistent", least)
        assert ids(selection) == kept
        assert selection.dropped == unusable | ({f"agreement below {least}": 3 - len(kept)} if len(kept) < 3 else {})
    assert ids(select(traces[:2], "consistent")) == [("a", 0), ("a", 1)]


def test_consistent_never_looks_at_the_truth():
    answers = (ON, OFF, ON)
    for truth in (UNLABELLED, tuple((label,) for label in ON), tuple((label,) for label in OFF)):
        traces = [make_trace("a", n, answer, truth=truth) for n, answer in enumerate(answers)]
        assert ids(select(traces, "consistent", 0.8)) == [("a", 0), ("a", 2)]


def test_a_cap_thins_out_common_classes_and_keeps_every_rare_one():
    traces = [make_trace(f"w{n}", 0, ("EATING", "EATING"), (("EATING",), ("EATING",))) for n in range(9)]
    traces += [make_trace(f"r{n}", 0, ("EATING", "COOKING"), (("EATING",), ("COOKING",))) for n in range(2)]
    kept = {cap: select(traces, "correct", cap=cap) for cap in (1, 3, 20)}
    assert kept[20].kept == traces and kept[20].by_class == {"COOKING": (2, 2), "EATING": (11, 11)}
    for cap, selection in kept.items():
        taught = Counter(label for trace in selection.kept for label in set(trace.answer))
        assert taught["COOKING"] == min(cap, 2) and cap <= taught["EATING"] <= cap + 2 or cap == 20
        assert len(selection.kept) + sum(selection.dropped.values()) == len(traces)
    assert kept[3].dropped == {"in classes with 3 others": 11 - len(kept[3].kept)}
    assert [t.window for t in kept[3].kept] != [t.window for t in traces[: len(kept[3].kept)]]  # not the first recordings alone
    shuffled = select(traces[::-1], cap=3)
    assert sorted(ids(shuffled)) == sorted(ids(kept[3])) and ids(shuffled)[::-1] == ids(kept[3])


def test_the_yield_by_class_counts_what_is_kept_of_each():
    assert select(TRACES, "correct").by_class == {"COOKING": (3, 8), "EATING": (3, 7)}
    assert select([make_trace("d", 0, HALF, truth=((), ()))], "all").by_class == {"COOKING": (1, 1)}


@pytest.mark.parametrize("keep", ["correct", "consistent", "best", "all"])
def test_unusable_traces_are_never_kept_and_all_are_counted(keep):
    selection = select(TRACES, keep, 0.0)
    assert not {("c", 0), ("c", 1)} & set(ids(selection))
    assert len(selection.kept) + sum(selection.dropped.values()) == len(TRACES)


@pytest.mark.parametrize("text", [{"reasoning_content": "so <|im_end|> then"}, {"content": "<tool_call>"}, {"reasoning_content": "a <think> b"}])
def test_a_control_token_in_the_text_makes_a_trace_unusable(text):
    trace = make_trace()
    spoilt = make_trace(messages=[*trace.messages[:-1], {**trace.messages[-1], **text}], sample=1)
    selection = select([trace, spoilt], "all")
    assert selection.kept == [trace] and selection.dropped == {"with a control token in its text": 1}
    assert yield_table([spoilt]).splitlines()[-1].split() == ["traces", *"000000"]


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match="--keep is one of correct, consistent, best, all, not 'right'"):
        select(TRACES, "right")


def test_the_yield_by_class_equals_what_select_keeps():
    table = [line.split() for line in yield_table(TRACES).splitlines()]
    assert table[1:] == [[name, *"433333"] for name in ("COOKING", "EATING", "traces")]
    half = make_trace("e", 0, ("COOKING", "COOKING"), (("COOKING", "READING"), ("EATING",)))
    table = [line.split() for line in yield_table([make_trace("f", 0, ("X",), (("SLEEPING",),)), half], (0.5, 1.0)).splitlines()]
    assert table[0] == ["agreement", "at", "least", "0.5", "1.0"]
    assert table[1:] == [["COOKING", "1", "0"], ["EATING", "1", "0"], ["READING", "1", "0"], ["SLEEPING", "0", "0"], ["traces", "1", "0"]]


def test_reasoning_is_learnt_with_thinking_on_and_the_answer_canonically(tokenizer):
    (example,) = examples_from_traces([make_trace()], tokenizer, "reasoning")
    prompt, learnt = split(example, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n")
    answer = '[{"event_id": 1, "activity": "COOKING"}, {"event_id": 2, "activity": "EATING"}]'
    assert learnt == f"<think>\nThe fridge, then the chair.\n</think>\n\n{answer}<|im_end|>"


def test_the_answer_alone_is_learnt_with_thinking_off(tokenizer):
    (example,) = examples_from_traces([make_trace()], tokenizer, "answer")
    prompt, learnt = split(example, tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert learnt == '[{"event_id": 1, "activity": "COOKING"}, {"event_id": 2, "activity": "EATING"}]<|im_end|>'


def test_traces_without_reasoning_are_counted_and_left_out_of_reasoning(tokenizer):
    silent = make_trace(messages=[*make_trace().messages[:2], {"role": "assistant", "content": "[]"}])
    counts = Counter()
    assert [e.window for e in examples_from_traces([silent, make_trace("w")], tokenizer, "reasoning", counts)] == ["w"]
    assert counts == {"without reasoning": 1}
    assert len(examples_from_traces([silent], tokenizer, "answer")) == 1


def test_truth_never_reaches_a_trace_example(tokenizer):
    trace = make_trace(answer=("EATING", "EATING"))
    other = make_trace(answer=("EATING", "EATING"), truth=(("COOKING",), ("COOKING",)))
    assert examples_from_traces([trace], tokenizer, "answer") == examples_from_traces([other], tokenizer, "answer")


def window(*labels):
    events = [Event(i, datetime(2024, 1, 1, 7, i), "fridge", "kitchen", "opened", tuple(true)) for i, true in enumerate(labels)]
    return Window("home/r1/0000", "home", "g", "r1", tuple(events))


HOME = Home("home", (("kitchen", ("fridge",)),), (Label("COOKING"), Label("EATING"), Label("SLEEPING")))


def test_unscored_events_carry_the_nearest_scored_label_the_one_before_first():
    assert true_answer(window((), ("EATING",), (), ("COOKING", "SLEEPING"), ())) == ["EATING", "EATING", "EATING", "COOKING", "COOKING"]
    assert true_answer(window((), ())) is None


def test_truth_examples_mask_exactly_the_labels_of_unscored_events(tokenizer):
    counts = Counter()
    windows = [window((), ("EATING",), ("SLEEPING",)), window((), ())]
    (example,) = examples_from_truth([HOME], windows, tokenizer, counts)
    assert counts == {"without a scored event": 1}
    masked, learnt = split(example, tokenizer)
    start = next(i for i, supervised in enumerate(example.mask) if supervised)
    assert tokenizer.decode(example.ids[start:]) == (
        '[{"event_id": 1, "activity": "EATING"}, {"event_id": 2, "activity": "EATING"}, {"event_id": 3, "activity": "SLEEPING"}]<|im_end|>'
    )
    assert learnt == (
        '[{"event_id": 1, "activity": ""}, {"event_id": 2, "activity": "EATING"}, {"event_id": 3, "activity": "SLEEPING"}]<|im_end|>'
    )
    assert masked.endswith("</think>\n\nEATING")


def test_examples_of_one_home_hold_one_prefix(tokenizer):
    first, second = examples_from_truth([HOME], [window(("EATING",)), window(("COOKING",), ())], tokenizer)
    assert first.prefix is second.prefix and tokenizer.decode(first.prefix).endswith("<|im_end|>\n<|im_start|>")


def test_preview_marks_what_is_learnt(tokenizer):
    (example,) = examples_from_truth([HOME], [window((), ("EATING",))], tokenizer)
    text = preview(example, tokenizer)
    prompt, _, rest = text.partition("{+")
    assert prompt.endswith("</think>\n\n") and rest.startswith('[{"event_id": 1')
    marked = "".join(part.partition("+}")[0] for part in text.rpartition("\n(")[0].split("{+")[1:])
    assert marked == split(example, tokenizer)[1]
    assert f"{sum(example.mask)} learnt" in text


def test_one_adapter_learns_one_template():
    assert template_of([make_trace(), make_trace()]) == "1"
    with pytest.raises(UserError, match=r"2 prompt templates \(1, 2\)"):
        template_of([make_trace(), make_trace(template="2")])


def split(example, tokenizer):
    """The text that is not supervised, prefix left out, and the text that is."""
    tokens = list(zip(example.ids, example.mask, strict=True))
    return tuple(tokenizer.decode([token for token, supervised in tokens if supervised == wanted]) for wanted in (False, True))
