"""A window as a request, a completion as labels, and a completion as reasoning and answer."""

from __future__ import annotations

import os
import signal
import threading
from datetime import datetime, timedelta
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harkd.distributed import World
from harkd.errors import UserError
from harkd.homes.answer import canonical
from harkd.homes.events import Event, Home, Label, Window
from harkd.homes.prompt import prompt
from harkd.qwen3.template import chat, split_completion
from harkd.qwen3.tokenizer import Tokenizer, read_tokenizer
from harkd.recognition import completions, first_windows, probabilities, read_answer, request, reread
from harkd.sampling.request import Sampling
from tests.tiny import tiny_tokenizer

START = datetime(2020, 3, 1, 7, 22, 45)
HOME = Home("flat", (("kitchen", ("fridge", "stove")),), (Label("COOKING"), Label("EATING")), ("Cooking ends at the table.",))
QUESTION = {"role": "user", "content": "What happens?"}


def window(number: int, sensor: str = "fridge") -> Window:
    events = tuple(Event(i, START + timedelta(minutes=number, seconds=i), sensor, "kitchen", "opened", ("COOKING",)) for i in range(3))
    return Window(f"flat/day1/{number:04}", "flat", "day1", "day1", events)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return read_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("rules", [True, False])
def test_a_request_is_the_chat_cut_in_two(tokenizer, thinking, rules):
    sampling = Sampling(seed=7)
    made = request(HOME, window(1), thinking=thinking, sampling=sampling, rules=rules, sample=2)
    whole = tokenizer.chat(prompt(HOME, window(1), rules=rules), thinking=thinking, generation_prompt=True)
    assert made.prefix + made.prompt == whole
    assert tokenizer.encode(made.prefix) + tokenizer.encode(made.prompt) == tokenizer.encode(whole)
    assert made.prompt.endswith("<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n"))
    assert (made.window, made.sample, made.sampling) == ("flat/day1/0001", 2, sampling)
    assert (HOME.rules[0] in made.prefix) == rules


def test_windows_of_a_home_share_the_prefix_and_nothing_of_a_window_is_in_it():
    first, second = (request(HOME, window(i, sensor), thinking=True, sampling=Sampling()) for i, sensor in ((1, "fridge"), (2, "doorbell")))
    assert first.prefix == second.prefix and first.prompt != second.prompt
    assert "doorbell" not in second.prefix and "doorbell" in second.prompt
    assert first.prefix.endswith("<|im_end|>\n<|im_start|>") and first.prompt.startswith("user\n")


def test_a_completion_that_was_cut_off_answers_nothing():
    text = canonical(["COOKING", "EATING", "COOKING"])
    for events in (window(1), 3):
        whole = read_answer(text, "stop", events, HOME.label_names)
        assert whole.labels == ("COOKING", "EATING", "COOKING") and not whole.causes
        cut = read_answer(text, "length", events, HOME.label_names)
        assert cut.malformed and not whole.malformed
        assert cut.labels == (None, None, None) and cut.causes == {"length": 3}


def test_a_completion_that_ended_is_read_strictly():
    answer = read_answer("<think>\nCOOKING\n</think>\n\n" + canonical(["COOKING", "DANCING"]), "stop", 3, HOME.label_names)
    assert answer.labels == ("COOKING", None, None)


@pytest.mark.parametrize(("limit", "expected"), [(None, 4), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_first_windows(limit, expected):
    dataset = SimpleNamespace(name="flat", windows=lambda split: (window(i) for i in range(4)))
    assert list(first_windows(dataset, "test", limit)) == [window(i) for i in range(expected)]


def test_first_windows_reads_no_further_than_the_limit_and_refuses_an_empty_split():
    read = []
    endless = SimpleNamespace(name="flat", windows=lambda split: (read.append(i) or window(i) for i in count()))
    assert len(list(first_windows(endless, "test", 2))) == 2 and len(read) == 2
    with pytest.raises(UserError, match="split 'validation' of flat holds no window"):
        list(first_windows(SimpleNamespace(name="flat", windows=lambda split: iter(())), "validation", None))


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nthe fridge\n</think>\n\n[1]", "the fridge", "[1]"),
        ("<think>\nthe fridge\n\nand the stove\n</think>\n\n[1]\n\n[2]", "the fridge\n\nand the stove", "[1]\n\n[2]"),
        ("<think>the fridge</think>[1]", "the fridge", "[1]"),
        ("<think>\n\n</think>\n\n[1]", "", "[1]"),
        ("[1]", "", "[1]"),
        ("\n[1]\n", "", "\n[1]\n"),
        ("", "", ""),
        ("the fridge\n</think>\n\n[1]", "the fridge", "[1]"),  # the prompt had opened the block
        ("<think>\nthe fridge", "the fridge", ""),
        ("<think>", "", ""),
        ("<think>\na\n</think>\n\n[1]\n<think>\nno, [2]", "a\n</think>\n\n[1]\n<think>\nno, [2]", ""),
        ("<think>\na\n</think>\n\n[1]\n<think>\nb\n</think>\n\n[2]", "a\n</think>\n\n[1]\n<think>\nb", "[2]"),
        ("well: <think>a</think>[1]", "a", "[1]"),
        ("<think>a <think> b</think>[1]", "a <think> b", "[1]"),
        ("<think>\n  a \n</think>\n\n [1]", "  a ", " [1]"),  # blanks are kept
    ],
)
def test_split_completion(text, reasoning, answer):
    assert split_completion(text) == (reasoning, answer)


plain = st.text(alphabet=st.sampled_from("ab [{\"é\n\t<>/")).map(lambda text: text.strip("\n"))


@given(plain, plain)
def test_a_well_formed_completion_is_rendered_as_it_was_written(reasoning, answer):
    """What a teacher writes after the generation prompt is, character by character, what the student is trained on."""
    completion = f"<think>\n{reasoning}\n</think>\n\n{answer}"
    parts = split_completion(completion)
    assert parts == (reasoning, answer)
    turn = {"role": "assistant", "reasoning_content": parts[0], "content": parts[1]}
    assert chat([QUESTION, turn]) == chat([QUESTION], generation_prompt=True) + completion + "<|im_end|>\n"


@given(plain)
def test_an_answer_without_reasoning_is_rendered_as_it_was_written(answer):
    reasoning, content = split_completion(answer)
    turn = {"role": "assistant", "reasoning_content": reasoning, "content": content}
    assert chat([QUESTION, turn]) == chat([QUESTION], thinking=False, generation_prompt=True) + answer + "<|im_end|>\n"


@given(st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", " "])).map("".join))
def test_split_completion_loses_no_words_of_the_answer(text):
    """On any text: the answer is its end, without a mark of thought; the reasoning stands in it."""
    reasoning, answer = split_completion(text)
    assert text.endswith(answer) and reasoning in text
    assert "<think>" not in answer and "</think>" not in answer


def test_a_stored_prediction_is_read_again_with_labels_normalised():
    labels, text = ["COOKING", "Watching TV"], 'I think\n[{"event_id": "1", "activity": "cooking"}, {"event_id": 2, "activity": "WATCHING_TV"}, {"event_id": 3, "activity": "x"}]'
    record = {"truth": [[], [], []], "answer": list(read_answer(text, "stop", 3, labels).labels), "text": text, "finish_reason": "stop"}
    assert record["answer"] == [None, None, None]
    assert reread(record, labels) == ("COOKING", "Watching TV", None)
    assert reread({**record, "finish_reason": "length"}, labels) == (None,) * 3
    assert reread({"truth": [[]], "answer": ["cooking"]}, labels) == ["cooking"]


class Slow:
    """Finishes requests three at a time, in their order."""

    def __init__(self, group=World()):
        self.model = SimpleNamespace(group=group)

    def generate(self, requests):
        running = []
        while running or not running:
            while len(running) < 3 and (one := next(requests, None)):
                running.append(one)
            if not running:
                return
            yield SimpleNamespace(request=running.pop(0))


@pytest.fixture
def heard():
    """SIGINT as Python handles it, which a process in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_lets_what_was_begun_end_and_a_second_one_does_not(heard, capsys):
    asked = [(window(i), request(HOME, window(i), thinking=False, sampling=Sampling())) for i in range(20)]
    before = signal.getsignal(signal.SIGINT)
    assert [done for done, _ in completions(Slow(), asked)] == [window for window, _ in asked]
    for second in (False, True):
        done = []
        with pytest.raises(KeyboardInterrupt):
            for one, _ in completions(Slow(), asked):
                done.append(one)
                if len(done) == 4 or second and len(done) == 5:
                    os.kill(os.getpid(), signal.SIGINT)
        assert done == [window for window, _ in asked[: 5 if second else 6]]
        assert signal.getsignal(signal.SIGINT) is before and "interrupt again to stop at once" in capsys.readouterr().err


def test_an_interrupt_that_is_not_heard_stays_so(heard):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = [(window(i), request(HOME, window(i), thinking=False, sampling=Sampling())) for i in range(5)]
    assert len([os.kill(os.getpid(), signal.SIGINT) for _ in completions(Slow(), asked)]) == 5


def test_an_interrupt_of_another_process_of_the_team_is_everybodys():
    asked, heard = [(window(i), request(HOME, window(i), thinking=False, sampling=Sampling())) for i in range(20)], []

    class Team(World):
        def sum(self, values):
            return [values[0] + (len(heard) >= 4)]

    with pytest.raises(KeyboardInterrupt):
        for one, _ in completions(Slow(Team()), asked):
            heard.append(one)
    assert heard == [window for window, _ in asked[:6]]


def test_another_thread_cannot_say_what_a_signal_does():
    asked, done = [(window(i), request(HOME, window(i), thinking=False, sampling=Sampling())) for i in range(5)], []
    thread = threading.Thread(target=lambda: done.extend(completions(Slow(), asked)))
    thread.start()
    thread.join()
    assert len(done) == 5


def test_probabilities_are_by_label():
    assert probabilities(SimpleNamespace(probabilities=[{1: 0.25, 0: 2 / 3}, {}]), HOME.label_names) == [{"COOKING": 0.666667, "EATING": 0.25}, {}]
    assert probabilities(SimpleNamespace(probabilities=None), HOME.label_names) is None
