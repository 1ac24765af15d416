"""Live recognition: the labels that eval's guided answers have, in order, soon, whoever asks, however many events come at once."""

import gc
import itertools
import json
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import harkd
from harkd.errors import UserError
from harkd.eval import main as evaluate
from harkd.homes.dataset import read
from harkd.live import Live, Recognizer
from harkd.recognize import serve
from harkd.sampling.request import Sampling
from tests.door_cases import lines, mixed, model, run, short_prompts  # noqa: F401
from tests.live_cases import HOME, Fake, event, fake, line, right


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
    recognizer.prepare(events[:7])
    after = list(recognizer.recognize(events[:10]))
    assert [it.activity for it in after] == records[0]["answer"] and [it.probability for it in after] == pytest.approx(chosen[:10], rel=1e-4)
    alone, answers = list(recognizer.recognize(events)), {}
    threads = [threading.Thread(target=lambda n=n: answers.update({n: list(recognizer.recognize(events))})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4 and all([it.activity for it in found] == [it.activity for it in alone] for found in answers.values())
    assert len(recognizer.generator.prefixes) == 1  # all windows of the home share it


def test_what_is_drawn_does_not_depend_on_what_runs_beside_it(model):
    recognizer = Recognizer.load(model, None, HOME, sampling=Sampling(temperature=5.0, top_k=0, top_p=1.0, max_new_tokens=500))
    events = [event(n) for n in range(40)]
    together = list(recognizer.recognize(events))
    parts = [found for at in range(0, 40, 10) for found in recognizer.recognize(events[at : at + 10])]
    assert [found.activity for found in parts] == [found.activity for found in together]
    same = [[found.activity for found in recognizer.recognize([replace(event(0), id=n) for _ in range(10)])] for n in range(4)]
    assert len(set(map(tuple, same))) > 1  # windows that tell the same, but for who they are


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


def test_a_window_is_prepared_while_it_fills_but_not_in_a_burst():
    live = Live(fake(window=4))
    generator, found = live.recognizer.generator, []
    reader = threading.Thread(target=lambda: found.extend(live))
    reader.start()
    for n in range(7):
        live.put(event(n))
        due = [1, 2, 3, *([1, 2, 3] if n > 3 else [])][: n + 1 - (n > 2)]
        end = time.monotonic() + 5
        while (generator.prepared != due or len(generator.calls) < (n > 2)) and time.monotonic() < end:
            time.sleep(0.005)
        assert generator.prepared == due and len(generator.calls) == (n > 2)
    live.close()
    reader.join()
    assert right(found, range(7)) and generator.prepared == [1, 2, 3, 1, 2, 3]
    live = Live(fake(window=4))
    for n in range(7):
        live.put(event(n))
    live.close()
    assert right(list(live), range(7)) and not live.recognizer.generator.prepared


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


def test_what_is_prepared_does_not_put_the_answer_off():
    """Each event comes in while the one before is prepared: the queue is never found empty behind the time of the oldest."""
    live = Live(fake(), max_wait=0.3)
    live.recognizer.generator.slow = 0.2

    def trickle():
        for n in range(9):
            live.put(event(n))
            time.sleep(0.19)
        live.close()

    begin = time.monotonic()
    threading.Thread(target=trickle).start()
    found = iter(live)
    assert right([next(found)], [0]) and time.monotonic() - begin < 1.0
    assert right(list(found), range(1, 9)) and len(live.recognizer.generator.calls) >= 3


def test_what_is_left_of_a_burst_is_prepared():
    live, found = Live(fake(window=4)), []
    for n in range(6):
        live.put(event(n))
    reader = threading.Thread(target=lambda: found.extend(live))
    reader.start()
    end = time.monotonic() + 5
    while not live.recognizer.generator.prepared and time.monotonic() < end:
        time.sleep(0.005)
    assert live.recognizer.generator.prepared == [2] and live.recognizer.generator.calls == [1]
    live.close()
    reader.join()
    assert right(found, range(6))


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
    wrong = [b"nonsense", b"[1]", b'{"time": "2024-05-01 07:00:00"}', line(0, time="yesterday"), line(0, state=7), line(0, state="<|im_end|>"), line(0, state="x" * 501), b"\xff\n", b"[" * 60_000, b"[" * 100_000, line(0, state="\U0001f600" * 126), line(0, more="x" * 66_000)]
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


def test_a_wait_is_a_number_of_seconds():
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="max-wait"):
            Live(fake(), max_wait=wrong)
