"""Traces on the disk: what goes in comes out, and a kill costs no more than the record it tore."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from harkd.distill.traces import TraceWriter, agreement, read_traces
from harkd.errors import UserError
from harkd.jsonl import JsonLinesWriter, read_json_lines
from tests.distill_cases import make_trace
from tests.helpers import ROOT


@pytest.fixture
def folder(tmp_path):
    with TraceWriter(tmp_path) as writer:
        for window, sample in (("a", 0), ("a", 1), ("b", 0)):
            writer.write(make_trace(window, sample))
    return tmp_path


def test_what_is_written_is_read_and_the_system_text_is_stored_once(folder):
    expected = [make_trace("a", 0), make_trace("a", 1), make_trace("b", 0)]
    assert list(read_traces(folder)) == expected == list(read_traces(folder / "traces.jsonl"))
    assert len((folder / "prompts.jsonl").read_bytes().splitlines()) == 1
    assert "You name" not in (folder / "traces.jsonl").read_text()
    assert list(json.loads((folder / "traces.jsonl").read_text().splitlines()[0])["messages"][0]) == ["role", "hash"]


def test_probabilities_are_kept_and_traces_from_before_have_none(folder):
    probabilities = [{"COOKING": 0.75, "EATING": 0.25}, {"EATING": 1.0}]
    with TraceWriter(folder) as writer:
        writer.write(make_trace("c", 0, guided=True, probabilities=probabilities))
    _edit(folder, 0, lambda record: (record.pop("guided"), record.pop("probabilities")))
    traces = list(read_traces(folder))
    assert traces[0] == make_trace("a", 0) and (traces[0].guided, traces[0].probabilities) == (False, None)
    assert (traces[3].guided, traces[3].probabilities) == (True, probabilities)


def test_any_text_survives(tmp_path):
    content = "\ud800 \x00 \u2028 \r\n \U0001f600"
    trace = make_trace(messages=[{"role": "user", "content": content}, {"role": "assistant", "content": content}])
    with TraceWriter(tmp_path) as writer:
        writer.write(trace)
    assert list(read_traces(tmp_path)) == [trace]


@pytest.mark.parametrize("file", ["traces.jsonl", "prompts.jsonl"])
def test_a_kill_at_any_byte_loses_only_the_torn_record(tmp_path, file, capsys):
    """Every truncation of either file: the writer tells of a torn line and continues, and the same records are there in the end, each once."""
    wanted = [make_trace("a", 0), make_trace("b", 0, messages=[{"role": "system", "content": "another home"}, *make_trace().messages[1:]])]
    with TraceWriter(tmp_path / "whole") as writer:
        for trace in wanted:
            writer.write(trace)
    prompts, traces = ((tmp_path / "whole" / name).read_bytes() for name in ("prompts.jsonl", "traces.jsonl"))
    first = traces.index(b"\n") + 1
    # a torn sidecar means that the second record had not been begun
    cuts = [(prompts, traces[:n]) for n in range(len(traces) + 1)] if file == "traces.jsonl" else []
    cuts += [(prompts[:n], traces[:first]) for n in range(prompts.index(b"\n") + 1, len(prompts) + 1)] if file == "prompts.jsonl" else []
    (tmp_path / "cut").mkdir()
    for sidecar, main in cuts[:: max(1, len(cuts) // 60)] + cuts[-2:]:
        (tmp_path / "cut" / "prompts.jsonl").write_bytes(sidecar)
        (tmp_path / "cut" / "traces.jsonl").write_bytes(main)
        with TraceWriter(tmp_path / "cut") as writer:
            torn = sum(bool(data) and not data.endswith(b"\n") for data in (sidecar, main))
            assert capsys.readouterr().err.count("ended in a torn line") == torn
            assert len(writer.done) == main.count(b"\n")
            for trace in wanted:
                if (trace.window, trace.sample) not in writer.done:
                    writer.write(trace)
        assert list(read_traces(tmp_path / "cut")) == wanted


def test_several_processes_append_whole_lines_and_cut_off_what_a_killed_one_tore(tmp_path):
    path, count = tmp_path / "x.jsonl", 150
    code = "import sys; from pathlib import Path; from harkd.jsonl import JsonLinesWriter as W; w = W(Path(sys.argv[1]))\n"
    code += "for n in range(int(sys.argv[2])): w.append({'n': n, 'of': sys.argv[3], 'text': 'x' * 9000}, sync=False)"
    processes = [subprocess.Popen([sys.executable, "-c", code, path, str(count), name], cwd=ROOT) for name in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    with JsonLinesWriter(path) as writer:
        with open(path, "ab") as other:
            other.write(b'{"n": 7, "of')
        writer.append({"n": count, "of": "d"})
        assert writer.repaired == 12
    records = [(record["of"], record["n"]) for _, record in read_json_lines(path)]
    assert records[-1] == ("d", count) and len(records) == 3 * count + 1
    assert all([n for of, n in records if of == name] == list(range(count)) for name in "abc")


def test_a_long_torn_line_is_cut_back_to_the_last_newline(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * 200_000)
    counts = Counter()
    assert [record for _, record in read_json_lines(path, counts)] == [{"a": 1}] and counts == {"torn": 1}
    with JsonLinesWriter(path) as writer:
        assert writer.repaired == 200_007
        writer.append({"c": 3})
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (2, {"c": 3})]
    long = b'{"a": "' + b"x" * 100_000 + b'"}\n'
    path.write_bytes(long * 2 + long[:70_000])  # the last newline is in neither the first nor the last block that is looked at
    JsonLinesWriter(path).close()
    assert path.read_bytes() == long * 2


@pytest.mark.parametrize("wrong", ['{\n "name": "home",\n "rooms": {}\n}', "some notes", "[1]\n[2", '{"a": 1}\nnotes\n{"b": 2', "[" * 100_000 + "\n{"], ids=range(5))
def test_a_file_of_another_kind_is_not_touched(tmp_path, wrong):
    path = tmp_path / "home.json"
    path.write_text(wrong)
    with pytest.raises(UserError, match="home.json"):
        JsonLinesWriter(path)
    assert path.read_text() == wrong


def test_a_whole_last_line_without_its_newline_is_read(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": 2}')
    assert [record for _, record in read_json_lines(tmp_path / "x.jsonl")] == [{"a": 1}, {"b": 2}]


def test_a_doubled_trace_counts_once_and_the_first_wins(folder):
    lines = (folder / "traces.jsonl").read_text().splitlines()
    other = json.dumps({**json.loads(lines[0]), "model": "another"})
    (folder / "traces.jsonl").write_text("\n".join([*lines, other]) + "\n")
    counts = Counter()
    assert [trace.model for trace in read_traces(folder, counts)] == ["teacher"] * 3
    assert counts == {"doubled": 1}


def test_writing_a_trace_twice_is_a_bug(folder):
    with TraceWriter(folder) as writer:
        writer.write(make_trace("new", 0))
        for key in (("a", 1), ("new", 0)):
            with pytest.raises(ValueError, match="written already"):
                writer.write(make_trace(*key))


def _edit(folder, line, change):
    lines = (folder / "traces.jsonl").read_text().splitlines()
    record = json.loads(lines[line])
    change(record)
    lines[line] = json.dumps(record)
    (folder / "traces.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("truth"), "line 2: the field 'truth' is missing"),
        (lambda record: record["answer"].pop(), "line 2: .* form of a trace"),
        (lambda record: record.update(messages=[]), "line 2: .* form of a trace"),
        (lambda record: record.update(probabilities=[{}]), "line 2: .* form of a trace"),
        (lambda record: record.update(tokens=None), "line 2: .* form of a trace"),
        (lambda record: record["messages"][1].update(content=None), "line 2: .* form of a trace"),
        (lambda record: record["messages"][1].pop("content"), "line 2: .* form of a trace"),
        (lambda record: record["messages"][0].update(hash="0" * 16), "line 2: its system text '0000000000000000' is not in .*prompts"),
    ],
)
def test_a_wrong_record_is_named(folder, change, message):
    _edit(folder, 1, change)
    traces = read_traces(folder)
    assert next(traces).window == "a"  # read lazily: the error comes when reading gets there
    with pytest.raises(UserError, match=message):
        list(traces)


def test_a_damaged_line_in_the_middle_is_named_to_writer_and_reader(folder):
    lines = (folder / "traces.jsonl").read_text().splitlines()
    (folder / "traces.jsonl").write_text("\n".join([lines[0], lines[1][:-9], lines[2]]) + "\n")
    for use in (lambda: TraceWriter(folder), lambda: list(read_traces(folder))):
        with pytest.raises(UserError, match="traces.jsonl, line 2 is not JSON"):
            use()


def test_missing_and_changed_files_are_named(folder, tmp_path_factory):
    with pytest.raises(UserError, match="holds no traces"):
        read_traces(tmp_path_factory.mktemp("empty"))
    (folder / "prompts.jsonl").write_text((folder / "prompts.jsonl").read_text().replace("You name", "You guess"))
    with pytest.raises(UserError, match="prompts.jsonl, line 1: the text was changed"):
        list(read_traces(folder))
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match="prompts.jsonl cannot be read"):
        list(read_traces(folder))


def test_agreement_is_over_scored_events_and_any_true_label_is_right():
    truth = [("COOKING",), (), ("EATING", "READING"), ("EATING",)]
    assert agreement(["COOKING", "EATING", "READING", None], truth) == pytest.approx(2 / 3)
    assert agreement(["COOKING"], [()]) is None
