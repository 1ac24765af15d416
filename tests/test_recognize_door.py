"""Live recognition by its command line: while events still come, after a kill, and what it says of mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from harkd.errors import UserError
from harkd.live import Recognizer
from harkd.recognize import main
from tests.door_cases import lines, model, outcome  # noqa: F401
from tests.helpers import ROOT
from tests.live_cases import HOME, line


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
    (tmp_path / "link.jsonl").symlink_to(path)
    for name in (path, tmp_path / "link.jsonl"):
        code, _, _, err = outcome(main, *argv[3:-1], name)
        assert code == 2 and err == f"harkd.recognize: another process is at work in {path}: wait for it, end it, or give another --out\n"
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
        (["--model", "/nowhere", "--home", "simulated:D0", "--max-wait", "0"], "max-wait is a number of seconds above 0"),
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


def test_a_full_disk_is_told_and_no_torn_line_stays(model, tmp_path, monkeypatch):
    path, write = tmp_path / "answers.jsonl", os.write
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=iter(map(line, range(3)))))
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data if b"state 0" in data else data[:7]))
    code, _, _, err = outcome(main, "--model", model, "--home", "simulated:D0", "--window", 1, "--out", path)
    assert code == 2 and err.splitlines()[-1] == f"harkd.recognize: {path} cannot be written: no room for a whole record"
    assert [row["state"] for row in lines(path)] == ["state 0"] and path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_file_without_answers_is_not_written_to(model, tmp_path, end):
    path = tmp_path / "home.json"
    path.write_text(text := '{"name": "home", "rooms": {}}' + end)
    code, _, _, err = outcome(main, "--model", model, "--home", "simulated:D0", "--out", path)
    assert code == 2 and "home.json, line 1 is no answer" in err and err.count("\n") == 1 and path.read_text() == text
    code, _, _, err = outcome(main, "--model", model, "--home", "simulated:D0", "--out", tmp_path)
    assert code == 2 and "Is a directory" in err and list(tmp_path.iterdir()) == [path]
