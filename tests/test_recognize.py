"""Live recognition: the labels that eval's guided answers have, in order, soon, whoever asks, however many events come at once."""

import gc
import itertools
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import harkd
from harkd.errors import UserError
from harkd.eval import main as evaluate
from harkd.homes.answer import canonical
from harkd.homes.dataset import read
from harkd.homes.events import Event, Home, Label
from harkd.recognize import Live, Recognizer, main, serve
from harkd.sampling.request import Sampling
from tests.door_cases import lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.helpers import ROOT

HOME = Home("h", (("kitchen", ("fridge",)),), (Label("A"), Label("B")))
START = datetime(2024, 5, 1, 7)


def event(n: int) -> Event:
    return Event(n, START + timedelta(seconds=n), "fridge", "kitchen", f"state {n}")


def line(n: int, **more) -> bytes:
    return json.dumps({"time": str(START + timedelta(seconds=n)), "sensor": "fridge", "room": "kitchen", "state": f"state {n}", **more}).encode()


class Fake:
    """In the place of a Generator: says B where an event's number is odd; `calls` counts windows, `wait` holds an answer back."""

    def __init__(self, batch: int = 4, wait: float = 0.0) -> None:
        self.batch, self.calls, self.wait, self.inside, self.lock = batch, [], wait, 0, threading.Lock()

    def generate(self, requests):
        self.inside += 1
        assert self.inside == 1, "one at a time"
        requests = list(requests)
        self.calls.append(len(requests))
        time.sleep(self.wait)
        for asked in reversed(requests):  # as they end: in no fixed order
            events = json.loads(asked.prompt[asked.prompt.index("[\n") : asked.prompt.rindex("]") + 1])
            said = [int(e["description"].split()[-1]) % 2 for e in events]
            text = f"<think>\nodd or even\n</think>\n\n{canonical(['AB'[i] for i in said])}"
            yield SimpleNamespace(request=asked, text=text, finish_reason="stop", probabilities=[{i: 0.75} for i in said])
        self.inside -= 1


def fake(batch: int = 4, wait: float = 0.0, window: int = 10) -> Recognizer:
    return Recognizer(Fake(batch, wait), HOME, Sampling(), window=window)


def right(found, numbers) -> bool:
    return [(it.event.id, it.activity, it.probability) for it in found] == [(n, "AB"[n % 2], 0.75) for n in numbers]


def test_it_says_what_eval_says(model, mixed, tmp_path):
    run(evaluate, "--model", model, "--data", mixed, "--split", "all", "--guided", "--no-thinking", "--temperature", 0, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("predictions-*.jsonl")
    told = {record["window"]: record for record in lines(path)}
    dataset = read(mixed)
    recognizer = harkd.Recognizer.load(model, None, dataset.homes[0])
    for recording in dataset.recordings():
        found = list(recognizer.recognize(recording.events()))
        records = [told[f"marble/{recording.id}/{n:04d}"] for n in range(2)]
        assert [it.activity for it in found] == sum((record["answer"] for record in records), [])
        chosen = [of[label] for record in records for of, label in zip(record["probabilities"], record["answer"])]
        assert [it.probability for it in found] == pytest.approx(chosen, rel=1e-4) and [it.event for it in found] == list(recording.events())
    events = list(recording.events())
    alone, answers = list(recognizer.recognize(events)), {}
    threads = [threading.Thread(target=lambda n=n: answers.update({n: list(recognizer.recognize(events))})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4 and all([it.activity for it in found] == [it.activity for it in alone] for found in answers.values())
    assert len(recognizer.generator.prefixes) == 1  # all windows of the home share it


def test_a_full_window_does_not_wait_and_a_part_of_one_not_for_long():
    live = Live(fake(), max_wait=0.3)
    found, arrived = iter(live), []
    for n in range(10):
        live.put(event(n))
    begin = time.monotonic()
    arrived += [next(found) for _ in range(10)]
    assert time.monotonic() - begin < 0.25 and right(arrived, range(10))
    begin = time.monotonic()
    for n in range(10, 13):
        live.put(event(n))
    arrived = [next(found) for _ in range(3)]
    assert 0.25 < time.monotonic() - begin < 5 and right(arrived, range(10, 13))
    live.put(event(13))
    live.close()
    assert right(list(found), [13])


def test_the_oldest_event_decides_how_long_to_wait():
    """Events that trickle in do not put the answer off."""
    live = Live(fake(), max_wait=0.4)

    def trickle():
        for n in range(9):
            live.put(event(n))
            time.sleep(0.1)
        live.close()

    threading.Thread(target=trickle).start()
    sizes = live.recognizer.generator.calls
    found = list(live)
    assert right(found, range(9)) and len(sizes) >= 2


def test_a_slow_model_does_not_put_off_what_has_waited_in_the_queue():
    """An event waits from `put` on, not from when the model has time for it; and by then its time may be over."""
    live = Live(fake(wait=1.0), max_wait=0.8)

    def some():
        live.put(event(0))  # the model is at it from 0.8 to 1.8 s
        time.sleep(0.9)
        live.put(event(1))

    threading.Thread(target=some).start()
    found, times = iter(live), []
    for n in range(2):
        assert right([next(found)], [n])
        times.append(time.monotonic())
    assert times[1] - times[0] < 1.5  # the model's second, and no 0.8 s of waiting before it
    live.close()
    assert right(list(found), [])


def test_who_stops_iterating_may_go_on_and_a_failure_loses_nothing():
    live = Live(fake(batch=1))
    for n in range(25):
        live.put(event(n))
    live.close()
    assert right([next(iter(live)) for _ in range(3)], range(3))
    generate, failing = live.recognizer.generator.generate, [1, 0]

    def once(requests):
        if failing.pop(0):
            raise UserError("no memory")
        live.recognizer.generator.generate = generate
        return generate(requests)

    live.recognizer.generator.generate = once
    assert right([next(iter(live)) for _ in range(7)], range(3, 10))
    with pytest.raises(UserError, match="no memory"):
        next(iter(live))
    assert right(list(live), range(10, 25))
    with pytest.raises(UserError, match="closed"):
        live.put(event(25))


def test_threads_and_homes_take_turns():
    """Each Recognizer of a generator, from any thread: Fake fails where two are at it."""
    generator, found = Fake(wait=0.01), {}
    homes = [Recognizer(generator, HOME, Sampling()) for _ in range(2)]
    threads = [threading.Thread(target=lambda k=k: found.update({k: list(homes[k % 2].recognize(event(n) for n in range(100)))})) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(right(of, range(100)) for of in found.values())


@pytest.mark.parametrize("capacity", [7, 1 << 14])
def test_a_burst_is_labelled_in_order_and_in_batches(capacity):
    live = Live(fake(batch=8, wait=0.001), max_wait=60, capacity=capacity)

    def burst():
        for n in range(10_000):
            live.put(event(n))
        live.close()

    threading.Thread(target=burst).start()
    assert right(list(live), range(10_000))
    calls = live.recognizer.generator.calls
    assert sum(calls) == 1000 and max(calls) <= 8 and (capacity < 10 or len(calls) < 300)


def test_threads_put_and_nothing_is_lost():
    live = Live(fake(window=3), max_wait=60)
    threads = [threading.Thread(target=lambda k=k: [live.put(event(n)) for n in range(k, 2000, 4)]) for k in range(4)]
    for thread in threads:
        thread.start()
    threading.Thread(target=lambda: ([thread.join() for thread in threads], live.close())).start()
    found = [it.event.id for it in live]
    assert sorted(found) == list(range(2000)) and all([n for n in found if n % 4 == k] == list(range(k, 2000, 4)) for k in range(4))


def test_what_is_read_ahead_is_bounded(monkeypatch):
    """However long the input: memory stays flat."""
    from harkd import recognize

    monkeypatch.setattr(recognize, "Live", lambda recognizer, max_wait: Live(recognizer, max_wait, capacity=50))
    read_so_far, written, ahead = [0], [0], [0]

    def many():
        for n in range(20_000):
            read_so_far[0] += 1
            yield line(n)

    def write(told):
        ahead[0] = max(ahead[0], read_so_far[0] - written[0])
        assert told["state"] == f"state {written[0]}"
        written[0] += 1

    assert serve(fake(batch=2), many(), write) == {"events": 20_000, "skipped": 0}
    assert written[0] == 20_000 and ahead[0] <= 50 + 2 * 2 * 10 + 3


def test_what_fails_while_reading_is_raised_and_what_was_read_is_labelled():
    def broken():
        yield from map(line, range(12))
        raise OSError(5, "Input/output error")

    told = []
    with pytest.raises(OSError, match="Input/output"):
        serve(fake(), broken(), told.append)
    assert [answer["state"] for answer in told] == [f"state {n}" for n in range(12)]


@pytest.mark.slow
def test_memory_stays_flat_over_100_000_events(model):
    """By a model, as fast as lines can be read: each event has one answer, in order."""
    recognizer, resident, number = Recognizer.load(model, None, HOME), [], itertools.count()

    def write(told):
        n = next(number)
        assert told["state"] == f"state {n}" and told["activity"] in ("A", "B")
        if n % 10_000 == 9_999:
            gc.collect()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    assert serve(recognizer, map(line, range(100_000)), write) == {"events": 100_000, "skipped": 0}
    assert next(number) == 100_000 and max(resident[2:]) - resident[1] < 4 << 20, resident


def test_lines_that_are_no_events_are_told_and_left_out(capsys):
    wrong = [b"nonsense", b"[1]", b'{"time": "2024-05-01 07:00:00"}', line(0, time="yesterday"), line(0, state=7), line(0, state="<|im_end|>"), line(0, state="x" * 501), b"\xff\n", b"[" * 60_000, line(0, state="\U0001f600" * 126), line(0, more="x" * 66_000)]
    wrong += [line(0, value=float("nan")), line(0)[:-1] + b', "value": 1e999}', line(0, state="\ud800"), line(0).replace(b"fridge", b"\xed\xa0\x80")]
    told = []
    given = [line(0, id="a"), *wrong, b"\n", line(1, room="", id=[2])]
    counts = serve(fake(), [*given[:-1], json.dumps({**json.loads(given[-1]), "time": "2024-05-01T07:00:01"}).encode()], told.append)
    assert counts == {"events": 2, "skipped": len(wrong)}
    assert told[0] == {**json.loads(line(0)), "id": "a", "activity": "A", "probability": 0.75} and told[1]["id"] == [2] and told[1]["activity"] == "B"
    err = capsys.readouterr().err.splitlines()
    assert len(err) == len(wrong) and err[0] == "line 2 is skipped: it is not JSON, or holds a number that is not finite" and all(row.startswith("line ") for row in err)
    serve(fake(), [line(0)], told.append, reasoning=True)
    assert told[-1]["reasoning"] == "odd or even"


def test_the_door_answers_while_events_still_come(model, tmp_path):
    home = {"name": "home", "rooms": {"kitchen": ["fridge (opened, closed)"]}, "labels": {"COOKING": "", "EATING": ""}}
    (tmp_path / "home.json").write_text(json.dumps(home))
    argv = [sys.executable, "-m", "harkd.recognize", "--model", model, "--home", str(tmp_path), "--window", "2", "--max-wait", "0.5"]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for count in (2, 1):  # a full window, and one that is not filled
        begin = time.monotonic()
        for n in range(count):
            process.stdin.write(f"{line(n).decode()}\n")
        process.stdin.flush()
        for n in range(count):
            told = json.loads(process.stdout.readline())
            assert told["state"] == f"state {n}" and told["activity"] in home["labels"] and 0 < told["probability"] <= 1
    assert time.monotonic() - begin < 20  # and not the minute that is usual
    out, _ = process.communicate(f"{line(5).decode()}\n", timeout=60)
    last = [json.loads(row) for row in out.splitlines()]
    assert process.returncode == 0 and last[0]["state"] == "state 5" and last[1:] == [{"events": 4, "skipped": 0}]


def test_who_reads_may_stop_reading(model):
    """As `| head` does: while events still come, and before the last line."""
    argv = [sys.executable, "-m", "harkd.recognize", "--model", model, "--home", "simulated:D0", "--window", "1"]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(line(0) + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["state"] == "state 0"
    process.stdout.close()
    process.stdin.write(line(1) + b"\n")
    process.stdin.flush()  # and stays open
    assert process.wait(60) == 0 and process.stderr.read() == b""
    process.stdin.close()


def test_interrupted_and_mistaken_while_input_is_open(model, tmp_path):
    """The thread that reads holds stdin; exit codes are those of a door all the same."""
    argv = [sys.executable, "-m", "harkd.recognize", "--model", model, "--home", "simulated:D0", "--window", "1"]
    for more, code, told in (([], 130, "interrupted"), (["--out", str(tmp_path / "answers.jsonl")], 2, "is not the event that was answered")):
        (tmp_path / "answers.jsonl").write_bytes(line(1, activity="A") + b"\n")
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (which a shell's background jobs ignore)
        process = subprocess.Popen([*argv, *more], cwd=ROOT, **pipes, preexec_fn=heard)
        process.stdin.write(line(0) + b"\n")
        process.stdin.flush()
        if code == 130:
            assert json.loads(process.stdout.readline())["state"] == "state 0"
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == code
        err = process.stderr.read().decode()
        assert told in err and err.count("\n") == 1
        process.stdin.close()
    assert (tmp_path / "answers.jsonl").read_bytes() == line(1, activity="A") + b"\n"


def test_flags_reach_the_model(monkeypatch, tmp_path, capsys):
    """What the command line says is what is loaded and asked."""
    from harkd import recognize

    given = {}
    monkeypatch.setattr(recognize, "live_mode", lambda adapter, thinking: bool(thinking))
    monkeypatch.setattr(Recognizer, "load", lambda *args, **more: given.update(args=args, **more))
    monkeypatch.setattr(recognize, "serve", lambda recognizer, lines, write, max_wait, reasoning, answered: given.update(max_wait=max_wait, reasoning=reasoning, answered=list(answered)) or {})
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=None))
    argv = ["--model", "m", "--adapter", "a", "--home", "h", "--window", "5", "--max-wait", "7"]
    assert main(argv) == 0
    assert given["args"] == ("m", "a", "h") and given["sampling"].temperature == 0 and (given["max_wait"], given["reasoning"], given["answered"]) == (7.0, False, [])
    assert (given["thinking"], given["window"], given["rules"], given["dtype"], given["machine"].batch) == (False, 5, True, None, 64)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line(1, activity="A") + b"\n" + line(2, activity="A"))
    argv += ["--thinking", "--reasoning", "--no-rules", "--temperature", "0.3", "--dtype", "float32", "--batch", "3", "--out", str(path)]
    assert main(argv) == 0
    assert given["sampling"].temperature == 0.3 and given["reasoning"] and [of["state"] for of in given["answered"]] == ["state 1"]
    assert (given["thinking"], given["rules"], given["dtype"], given["machine"].batch) == (True, False, "float32", 3)


def test_a_window_that_could_never_be_answered_is_told_at_once(model):
    with pytest.raises(UserError, match="max_new_tokens|max-new-tokens|positions"):
        Recognizer.load(model, None, HOME, window=500)


@pytest.mark.parametrize("torn", [b'{"time": "2024', line(4, activity="A")])
def test_a_killed_run_goes_on_behind_its_last_answer(model, tmp_path, torn):
    """Each event has one answer, in order, wherever the first run was killed; a torn line is written again, one without its end too."""
    given, path = b"".join(line(n) + b"\n" for n in range(12)), tmp_path / "answers.jsonl"
    argv = [sys.executable, "-m", "harkd.recognize", "--model", model, "--home", "simulated:D0", "--window", "2", "--out", str(path)]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(given[: given.index(b"state 5")])  # up to the middle of a line
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    with open(path, "ab") as file:
        file.write(torn)
    done = subprocess.run(argv, cwd=ROOT, input=given, capture_output=True)
    assert done.returncode == 0 and json.loads(done.stdout) == {"events": 12, "skipped": 0}
    assert [row["state"] for row in lines(path)] == [f"state {n}" for n in range(12)] and all(row["activity"] for row in lines(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --model, --home"),
        (["--model", "{model}", "--home", "/nowhere"], "there is no home /nowhere"),
        (["--model", "{model}", "--home", "simulated:X"], "there is no simulated home"),
        (["--model", "{model}", "--home", "simulated:D0", "--window", "0"], "--window must be at least 1"),
        (["--model", "{model}", "--home", "simulated:D0", "--out", "/nowhere/x"], "/nowhere/x cannot be written"),
        (["--model", "{model}", "--home", "~no-such-user/x"], "there is no home ~no-such-user/x"),
        (["--model", "{model}", "--home", "x" * 5000], "there is no home xxx"),
        (["--model", "{model}", "--home", "csv:" + "x" * 5000], "there is no folder xxx"),
        (["--model", "{model}", "--home", "simulated:D0", "--guided"], "unrecognized arguments: --guided"),
        (["--model", "{model}", "--home", "simulated:D0", "--exact-probabilities"], "unrecognized arguments: --exact-probabilities"),
    ],
)
def test_mistakes_are_told(model, flags, message):
    code, _, _, err = outcome(main, *[flag.format(model=model) for flag in flags])
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_file_without_answers_is_not_written_to(model, tmp_path, end):
    path = tmp_path / "home.json"
    path.write_text(text := '{"name": "home", "rooms": {}}' + end)
    code, _, _, err = outcome(main, "--model", model, "--home", "simulated:D0", "--out", path)
    assert code == 2 and "home.json, line 1 is no answer" in err and err.count("\n") == 1 and path.read_text() == text


def test_a_wait_is_a_number_of_seconds():
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="max-wait"):
            Live(fake(), max_wait=wrong)
