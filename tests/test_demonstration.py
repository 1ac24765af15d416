"""The demonstration with its controls, on a few windows: rows may join later, and what is wrong is told before anything is written."""

import json
from dataclasses import replace

import pytest

from harkd.distill.traces import read_traces
from tools import demonstration
from tools.demonstration import main, shuffle, summary


@pytest.fixture
def short(monkeypatch):
    """The doors on few windows, and one epoch."""
    for name, fewer in (("generate", {"limit": 6}), ("evaluate", {"limit": 3}), ("train", {"epochs": 1})):
        door = getattr(demonstration, name)
        monkeypatch.setattr(demonstration, name, lambda settings, door=door, fewer=fewer: door(replace(settings, **fewer)))


def test_rows_may_join_later(short, tmp_path, capsys):
    asked = [str(tmp_path), "--seeds", "10", "11", "--only"]
    assert main([*asked, "all traces"]) == 0
    first = json.loads((tmp_path / "controls.json").read_text())
    trained = (tmp_path / "10/by-all/result.json").stat().st_mtime_ns
    assert main([str(tmp_path), "--seeds", "10", "--only", "shuffled traces"]) == 0
    second = json.loads((tmp_path / "controls.json").read_text())
    assert (tmp_path / "10/by-all/result.json").stat().st_mtime_ns == trained
    assert second["rows"].keys() - first["rows"].keys() == {"student, shuffled traces"} and second["seeds"] == [10, 11]
    assert all(second["rows"][row] == of for row, of in first["rows"].items())
    alone = second["rows"]["student, shuffled traces"]["D"]
    assert alone["n"] == 1 and alone["interval"] is None and first["rows"]["teacher"]["T"]["n"] == 2
    told = capsys.readouterr().out.splitlines()
    ratios = json.loads(told[-1])["ratios"]
    of_home = [second["by_seed"][seed]["D"] for seed in ("10", "11")]
    ratio = sum(of["student, all traces"] / of["teacher"] for of in of_home) / 2
    assert ratios["student, all traces / teacher"] == pytest.approx(ratio) and any(line.startswith("student before") for line in told)
    gap = sum(of["teacher"] - of["student before"] for of in of_home) / 2
    assert ratios["teacher - student before"] == pytest.approx(gap)


def test_the_interval_is_students():
    found = summary([0.8, 0.82, 0.87])
    assert found["interval"] == pytest.approx([0.8300 - 0.0896, 0.8300 + 0.0896], abs=2e-4) and found["median"] == 0.82


def test_every_window_gets_the_trace_of_another(short, tmp_path):
    demonstration.write_traces(10, tmp_path, False)
    own, given = ({trace.window: trace for trace in read_traces(tmp_path / name)} for name in ("traces", "shuffled"))
    full = [window for window, trace in own.items() if len(trace.answer) == 10]
    assert len(full) > 2 and set(full[1:]) <= given.keys() | {full[0]} and all(trace.messages[:-1] == own[window].messages[:-1] for window, trace in given.items())
    sources = {window: [w for w, of in own.items() if of.messages[-1] == trace.messages[-1]] for window, trace in given.items()}
    assert all(found and found != [window] and own[found[0]].answer == given[window].answer for window, found in sources.items())
    assert [shuffle(list(own.values()), 1) == shuffle(list(own.values()), seed) for seed in (1, 2)] == [True, False]


def test_a_wrong_row_is_told_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), "--only", "correct"])
    assert stopped.value.code == 2 and "there is no 'correct', but true answers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
