"""Batch files that do not have the form, and those that nearly do."""

import json

import pytest

from harkd.distill.batch_file import read_completions
from harkd.errors import UserError


def file(tmp_path, *records):
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def body(message, **more):
    return {"choices": [{"message": message, **more}]}


def record(custom_id="w/1#0", **response):
    return {"custom_id": custom_id, "response": response}


@pytest.mark.parametrize("custom_id", ["w/1", "#0", "w/1#", "w/1#x", "w/1#-1", "w/1#²", "w/1#1.0", None, 7])
def test_an_odd_custom_id_is_refused_by_line(tmp_path, custom_id):
    good = record(body=body({"content": "a"}))
    with pytest.raises(UserError, match=r"completions.jsonl, line 2: custom_id .* is not of the form WINDOW#SAMPLE"):
        read_completions(file(tmp_path, good, record(custom_id, body=body({"content": "a"}))))


def test_a_window_with_a_hash_in_its_name(tmp_path):
    assert set(read_completions(file(tmp_path, record("home/a#b/0001#12", body=body({"content": "a"}))))) == {("home/a#b/0001", 12)}


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"choices": []}, {"choices": [{}]}, {"choices": {}}, {"choices": [{"message": None}]}, body("text"), body({"content": ["a"]}), body({"content": 5}),
        body({"content": ["a"], "reasoning_content": "b"}), body({"content": "a", "reasoning_content": 3}), {**body({"content": "a"}), "usage": {"prompt_tokens": "many"}}, ["a"], "text",
    ],
)  # fmt: skip
def test_a_response_of_another_form_is_refused_by_line(tmp_path, answer):
    path = file(tmp_path, record(body=answer))
    if not answer:
        assert read_completions(path) == {}  # counted as failed
        return
    with pytest.raises(UserError, match="completions.jsonl, line 1: the response does not have the form"):
        read_completions(path)


def test_what_servers_leave_out(tmp_path):
    found = read_completions(file(tmp_path, record(body={**body({"content": None}, finish_reason=None), "usage": {"prompt_tokens": None}})))
    assert found == {("w/1", 0): ("", "stop", {"prompt": 0, "completion": 0})}
    found = read_completions(file(tmp_path, record(body={**body({"content": "a \ud83d b", "reasoning_content": None}), "usage": None})))
    assert found["w/1", 0][0] == "a ? b"


def test_failed_requests_are_counted_and_the_first_answer_stands(tmp_path, capsys):
    failed = [
        {"custom_id": "w/1#0", "response": None, "error": "x"},
        {"custom_id": "w/1#0"},
        record(status_code=500, body={"error": "x"}),
        {"custom_id": "w/1#0", "response": "x"},
    ]
    found = read_completions(file(tmp_path, *failed, record(body=body({"content": "a"}), status_code=200), record(body=body({"content": "b"}))))
    assert found["w/1", 0][0] == "a" and "4 requests failed" in capsys.readouterr().err


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_completions(tmp_path / "nothing")
    (tmp_path / "completions.jsonl").write_text('{"custom_id": "a#0"}\nnot JSON\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_completions(tmp_path / "completions.jsonl")
