"""python -m harkd.generate: what it writes, how it goes on, and that sampling does not depend on how it ran."""

import json
import re
import signal
import time
from pathlib import Path
from random import Random

import pytest

from harkd.distill.traces import read_traces
from harkd.generate import GenerateSettings, main
from harkd.homes.answer import canonical
from harkd.homes.dataset import read
from harkd.homes.prompt import prompt, text_hash
from harkd.sampling.request import recommended
from tests.door_cases import child, content, data, kill, lines, model, outcome, run, short_prompts  # noqa: F401

FIELDS = {
    "data", "home", "group", "recording", "window", "sample", "labels", "messages", "answer", "causes", "truth", "agreement", "tokens", "finish_reason", "seed", "model",
    "thinking", "template", "answer_form", "guided", "probabilities",
}  # fmt: skip


@pytest.fixture
def argv(model, data, tmp_path):
    return ["--model", model, "--data", data, "--out", tmp_path / "out", "--max-new-tokens", 6, "--temperature", 1, "--samples", 2, "--dtype", "float64"]


def wanted(data, split="train", samples=2):
    return {(window.id, sample) for window in read(data).windows(split) for sample in range(samples)}


def ids(folder):
    return [(record["window"], record["sample"]) for record in lines(Path(folder) / "traces.jsonl")]


def texts(folder):
    return {(r["window"], r["sample"]): (r["messages"][-1], r["finish_reason"], r["tokens"]) for r in lines(Path(folder) / "traces.jsonl")}


def test_a_trace_for_every_window_and_sample(argv, data, model, tmp_path):
    code, result, _, err = outcome(main, *argv)
    out = tmp_path / "out"
    assert code == 0 and len(ids(out)) == len(set(ids(out))) and set(ids(out)) == wanted(data)
    assert result["wanted"] == result["traces"] == len(wanted(data)) and result["incomplete"] == result["traces"]
    dataset, windows = read(data), {window.id: window for window in read(data).windows()}
    for record in lines(out / "traces.jsonl"):
        window = windows[record["window"]]
        system, user = prompt(dataset.homes[0], window)
        assert set(record) == FIELDS
        assert record["messages"][:2] == [{"role": "system", "hash": text_hash(system["content"])}, user]
        assert (record["group"], record["recording"], record["model"], record["data"]) == (window.group, window.recording, model, data)
        assert record["truth"] == [list(event.labels) for event in window.events] and record["labels"] == ["COOKING", "EATING", "WATCHING_TV"]
        cut_off = record["tokens"]["completion"] == 6
        assert record["finish_reason"] == ("length" if cut_off else "stop") and record["answer"] == [None] * 3 and record["agreement"] == 0
        assert sum(record["causes"].values()) == 3 and (record["causes"] == {"length": 3}) == cut_off
    assert lines(out / "prompts.jsonl") == [{"hash": text_hash(system["content"]), "content": system["content"]}]
    assert len(list(read_traces(out))) == len(ids(out))
    settings, cost = (json.loads((out / name).read_text()) for name in ("settings.json", "cost.json"))
    assert settings["door"] == "generate" and settings["sampling"]["temperature"] == 1 and settings["samples"] == 2
    assert cost["seconds"] > 0 and cost["peak_memory_bytes"]["cpu"] > 1e6 and cost["completion_tokens"] == sum(record["tokens"]["completion"] for record in lines(out / "traces.jsonl"))
    assert json.loads((out / "result.json").read_text()) == result


def test_again_it_is_done_and_changes_no_byte_other_settings_are_refused_and_overwrite_removes_its_own(argv, data, tmp_path):
    first = run(main, *argv)
    (tmp_path / "out/notes.txt").write_text("mine")
    before = content(tmp_path / "out")
    code, result, _, err = outcome(main, *argv)
    assert code == 0 and result == first and "is done" in err and content(tmp_path / "out") == before
    code, _, _, err = outcome(main, *argv, "--seed", 1)
    assert code == 2 and err.count("\n") == 1 and "sampling.seed: 0, now 1" in err and "--overwrite" in err
    assert content(tmp_path / "out") == before
    run(main, *argv, "--seed", 1, "--overwrite")
    after = content(tmp_path / "out")
    assert after["notes.txt"] == b"mine" and after["traces.jsonl"] != before["traces.jsonl"] and set(after) == set(before)
    assert set(ids(tmp_path / "out")) == wanted(data) and len(ids(tmp_path / "out")) == len(wanted(data))


def test_a_folder_may_be_moved_or_named_with_a_slash(argv, tmp_path):
    first = run(main, *argv)
    assert run(main, *argv, "--out", f"{tmp_path / 'out'}/") == first
    (tmp_path / "out").rename(tmp_path / "moved")
    assert run(main, *argv, "--out", tmp_path / "moved") == first


def test_settings_from_python_sample_as_is_recommended_for_their_mode():
    for thinking in (True, False):
        assert GenerateSettings("m", "d", "o", thinking=thinking).sampling == recommended(thinking)
    assert recommended(True) != recommended(False)


def test_a_mistake_with_overwrite_removes_nothing(argv, tmp_path):
    run(main, *argv)
    before = content(tmp_path / "out")
    assert outcome(main, *argv, "--overwrite", "--model", tmp_path / "nowhere")[0] == 2
    assert outcome(main, *argv, "--overwrite", "--device", "nonsense")[0] == 2
    assert outcome(main, *argv, "--overwrite", "--import-completions", tmp_path / "nowhere")[0] == 2
    assert content(tmp_path / "out") == before


def test_overwrite_does_not_touch_a_folder_that_is_no_run_of_this_door(argv, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/traces.jsonl").write_text("somebody's")
    assert outcome(main, *argv, "--overwrite")[0] == 2 and content(tmp_path / "out") == {"traces.jsonl": b"somebody's"}
    (tmp_path / "out/settings.json").write_text('{"door": "train"}')
    code, _, _, err = outcome(main, *argv, "--overwrite")
    assert code == 2 and "another door (train)" in err and (tmp_path / "out/traces.jsonl").read_text() == "somebody's"


def test_a_mistake_does_not_claim_the_folder(argv, tmp_path):
    assert outcome(main, *argv, "--model", tmp_path / "nowhere")[0] == 2
    assert not (tmp_path / "out").exists()
    run(main, *argv)


def test_limit_and_no_thinking(model, data, tmp_path):
    argv = ["--model", model, "--data", data, "--max-new-tokens", 3]
    run(main, *argv, "--out", tmp_path / "a", "--limit", 2)
    assert [window for window, _ in sorted(ids(tmp_path / "a"))] == sorted(window.id for window in list(read(data).windows("train"))[:2])
    run(main, *argv, "--out", tmp_path / "b", "--limit", 2, "--no-thinking")
    a, b = (lines(tmp_path / name / "traces.jsonl")[0] for name in "ab")
    assert a["thinking"] and not b["thinking"]
    assert b["tokens"]["prompt"] == a["tokens"]["prompt"] + 4  # <think>, \n\n, </think>, \n\n, of which the tiny tokenizer knows \n\n
    assert json.loads((tmp_path / "b/settings.json").read_text())["sampling"]["temperature"] == 0.7
    assert run(main, *argv, "--out", tmp_path / "c", "--split", "all")["traces"] == 6


def test_what_is_sampled_does_not_depend_on_the_batch(argv, tmp_path):
    run(main, *argv, "--batch", 1)
    run(main, *argv, "--out", tmp_path / "other", "--batch", 5)
    assert texts(tmp_path / "out") == texts(tmp_path / "other")
    samples = {window: text for (window, _), text in texts(tmp_path / "out").items()}
    assert any(texts(tmp_path / "out")[window, 0] != text for window, text in samples.items())


def test_a_torn_last_line_is_written_again_wherever_it_was_torn(argv, data, tmp_path):
    run(main, *argv, "--limit", 1)
    out, whole = tmp_path / "out", content(tmp_path / "out")
    first, last = whole["traces.jsonl"].splitlines(keepends=True)
    for cut in sorted({1, 2, len(last) // 2, len(last) - 1}):  # every byte: with the writer alone, below
        (out / "traces.jsonl").write_bytes(first + last[:-cut])
        (out / "result.json").unlink()
        run(main, *argv, "--limit", 1)
        assert (out / "traces.jsonl").read_bytes() == whole["traces.jsonl"]


def test_a_line_torn_at_any_byte_is_cut_off_and_missed(argv, tmp_path):
    from harkd.distill.traces import TraceWriter

    run(main, *argv, "--limit", 1)
    path = tmp_path / "out/traces.jsonl"
    traces, whole = list(read_traces(path)), path.read_bytes()
    first, last = whole.splitlines(keepends=True)
    for length in range(len(last)):
        path.write_bytes(first + last[:length])
        with TraceWriter(path.parent) as writer:
            assert writer.done == {(traces[0].window, traces[0].sample)} and path.read_bytes() == first
            writer.write(traces[1])
        assert path.read_bytes() == whole


def test_killed_at_any_moment_it_completes_the_same_set(argv, data, tmp_path):
    run(main, *argv)
    expected, out = texts(tmp_path / "out"), tmp_path / "killed"
    argv = [*argv, "--out", out, "--batch", 2]
    codes = []
    for count in (0, 1, 3, 6):
        code, _, _ = kill(child("generate", *argv), lambda: (out / "traces.jsonl").exists() and (out / "traces.jsonl").read_bytes().count(b"\n") >= count)
        codes.append(code)
    assert codes[:3] == [-9, -9, -9]
    (out / ".settings.json.77.tmp").write_text("{")
    run(main, *argv)
    assert texts(out) == expected and len(ids(out)) == len(expected) and not list(out.glob(".*.tmp"))


@pytest.mark.slow
def test_killed_at_20_random_moments_it_loses_nothing_that_was_reported(argv, data, tmp_path, moments=20):
    """Killed while it loads, writes or ends a trace: what a whole line or the progress bar has told is there, as it was, and goes on."""
    argv = [*argv, "--samples", 20 * moments, "--batch", 3]  # more than the moments let it write
    out, draw = tmp_path / "out", Random(moments)
    path, total = out / "traces.jsonl", 4 * 20 * moments

    def whole() -> bytes:
        return path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1] if path.exists() else b""

    for moment in range(moments):
        before, more, later = whole().count(b"\n"), draw.randint(0, 3), time.monotonic() + 60
        process = child("generate", *argv)
        while whole().count(b"\n") < before + more:
            assert process.poll() is None and time.monotonic() < later
        time.sleep(draw.random() * (2.0 if more == 0 else 0.05))  # while it loads, or is about to write
        told = whole()
        code, _, err = kill(process, lambda: True)
        assert code == -9 and whole().startswith(told)
        reported = [int(n) for n in re.findall(rf"\b(\d+)/{total}\b", err)]
        assert whole().count(b"\n") >= max(reported, default=0) and len(ids(out) if whole() else []) < total, moment
    kept = whole()
    run(main, *argv)
    assert kept and path.read_bytes().startswith(kept)
    assert len(ids(out)) == len(set(ids(out))) == total and set(ids(out)) == wanted(data, samples=20 * moments)


def test_interrupted_it_says_how_to_go_on(argv, tmp_path):
    out = tmp_path / "out"
    argv = [*argv, "--max-new-tokens", 200, "--batch", 1]
    code, _, err = kill(child("generate", *argv), lambda: (out / "traces.jsonl").exists() and (out / "traces.jsonl").stat().st_size, signal.SIGINT)
    assert code == 130 and err.splitlines()[-1] == "harkd.generate: interrupted; the same command goes on from what is on the disk" and "Traceback" not in err
    assert "what was begun is finished" in err and 1 <= len(set(ids(out))) == len(ids(out)) < 8 and not (out / "result.json").exists()


def test_with_an_adapter(argv, model, data, tmp_path):
    from harkd.train import main as train

    run(train, "--model", model, "--train-on", "truth", "--data", data, "--out", tmp_path / "adapter", "--epochs", 2, "--lr", 0.05, "--validation", 0)
    run(main, *argv)
    run(main, *argv, "--out", tmp_path / "adapted", "--adapter", tmp_path / "adapter")
    assert not lines(tmp_path / "adapted/traces.jsonl")[0]["thinking"]  # as it was trained
    assert texts(tmp_path / "adapted") != texts(tmp_path / "out")
    code, _, _, err = outcome(main, *argv, "--out", tmp_path / "x", "--adapter", tmp_path / "adapter", "--thinking")
    assert code == 2 and "trained without reasoning" in err
    with open(tmp_path / "adapter/adapter_model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    code, _, _, err = outcome(main, *argv, "--out", tmp_path / "adapted", "--adapter", tmp_path / "adapter")
    assert code == 2 and "other settings (inputs." in err


def served(prompts: Path, file: Path, answer) -> Path:
    """What a batch server makes of a file of prompts."""
    file.write_text("".join(json.dumps({"id": "x", "custom_id": line["custom_id"], **answer(number)}) + "\n" for number, line in enumerate(lines(prompts))))
    return file


def completion(finish_reason="stop", **message):
    body = {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
    return {"response": {"status_code": 200, "body": body}, "error": None}


def test_prompts_out_and_completions_in(argv, data, tmp_path):
    code, result, _, _ = outcome(main, *argv[:4], "--samples", 2, "--export-prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 6)
    assert code == 0 and result == {"exported": 8, "file": str(tmp_path / "prompts.jsonl")}
    dataset, windows = read(data), {window.id: window for window in read(data).windows()}
    for line in lines(tmp_path / "prompts.jsonl"):
        window, sample = line["custom_id"].rsplit("#", 1)
        body = line["body"]
        assert body["messages"] == prompt(dataset.homes[0], windows[window]) and body["seed"] == int(sample) and body["max_tokens"] == 6
        assert body["chat_template_kwargs"] == {"enable_thinking": True} and body["temperature"] == 0.6
    right, wrong = canonical(["COOKING"] * 3), canonical(["EATING"] * 3)
    answers = [
        completion(reasoning_content="\nthe fridge\n", content=right), completion(content=f"<think>\nthe fridge\n</think>\n\n{right}"),
        completion(reasoning="hm", content=wrong), completion(content=right, finish_reason="length"),
        {"response": None, "error": {"code": "rate_limit"}}, {"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}, "error": None},
    ]  # fmt: skip
    file = served(tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", lambda n: answers[n] if n < 6 else answers[0])
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:7]))  # the last prompt has no answer
    argv = [*argv, "--import-completions", file]
    code, result, _, err = outcome(main, *argv)
    assert code == 0 and "2 requests failed" in err and "no answer to 3 of the prompts" in err
    assert (result["wanted"], result["traces"], result["correct"], result["incomplete"]) == (8, 5, 3, 1)
    first, second, third, fourth, _ = lines(tmp_path / "out/traces.jsonl")
    assert set(first) == FIELDS and first["messages"][2] == second["messages"][2] == {"role": "assistant", "reasoning_content": "the fridge", "content": right}
    assert first["tokens"] == {"prompt": 9, "completion": 4} and first["agreement"] == 1
    assert third["agreement"] == 0 and third["messages"][2]["reasoning_content"] == "hm" and fourth["finish_reason"] == "length" and fourth["answer"] == [None] * 3

    missing = wanted(data) - set(ids(tmp_path / "out"))  # what failed is asked again, and its answers are added
    assert run(main, *argv[:-2], "--export-prompts", tmp_path / "again.jsonl")["exported"] == 3
    assert {tuple(line["custom_id"].rsplit("#", 1)) for line in lines(tmp_path / "again.jsonl")} == {(window, str(sample)) for window, sample in missing}
    more = served(tmp_path / "again.jsonl", tmp_path / "more.jsonl", lambda n: answers[0])
    assert run(main, *argv, "--import-completions", more)["traces"] == 8 and set(ids(tmp_path / "out")) == wanted(data)
    assert outcome(main, *argv, "--import-completions", more)[3].count("is done") == 1


def test_greedy_reasoning_is_warned_of(argv):
    argv = [*argv, "--limit", 1, "--temperature", 0]
    warned = [outcome(main, *argv, flag, "--overwrite")[3].count("warning: greedy decoding with reasoning") for flag in ("--thinking", "--no-thinking")]
    assert warned == [1, 0]
