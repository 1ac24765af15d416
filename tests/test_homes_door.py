"""python -m harkd.homes"""

import json
import os
import subprocess
import sys

import pytest

from harkd.homes.__main__ import main
from harkd.homes.dataset import read
from harkd.homes.prompt import prompt
from tests.helpers import MARBLE, QWEN3, ROOT, needs_marble, needs_qwen3
from tests.marble_files import environment, labels, recording


@pytest.fixture
def folder(tmp_path):
    for day, subjects in enumerate(["ab", "a", "b", "cd"]):
        recording(tmp_path, f"A2m/instance{day + 1}", subjects, 12, day)
    labels(tmp_path / "A2m/instance1", "a", (5, 0, "COOKING"))
    labels(tmp_path / "A2m/instance1", "b", (0, 20, "TRANSITION"))
    return tmp_path


def run(capsys, *argv: str) -> tuple[str, dict]:
    assert main(argv) == 0
    out = capsys.readouterr().out
    *text, last = out.splitlines()
    return "\n".join(text), json.loads(last)


def test_tells_what_was_read(folder, capsys):
    text, result = run(capsys, f"marble:{folder}")
    counts = {"recordings": 4, "groups": 4, "residents": 4, "sensors": 1, "events": 48, "scored": 40}
    assert {name: result[name] for name in counts} == counts
    assert result["labels"] == {"COOKING": 40}
    assert result["windows"] == {"train": 4, "validation": 2, "test": 2}
    assert result["repaired"] == {"label interval that ends before it starts: ends swapped": 1}
    assert result["unscored"] == {"TRANSITION": 6, "outside its subject's label intervals": 2}
    assert result["prompt_tokens"] is None and result["template"] == "1"
    for line in ("recordings  4 in 4 groups", "residents   4", "sensors     1", "events      48: 40 scored, 8 without a label on offer"):
        assert line in text.splitlines()
    for line in (
        "40  COOKING",
        "0  EATING",
        "4  train",
        "2  test",
        "6  TRANSITION",
        "1  label interval that ends before it starts: ends swapped",
    ):
        assert line in [row.strip() for row in text.splitlines()]


def test_shows_a_prompt_of_the_training_side(folder, capsys):
    dataset = read(f"marble:{folder}")
    window = next(dataset.windows("train"))
    for flags, rules in (((), True), (("--no-rules",), False)):
        text, _ = run(capsys, f"marble:{folder}", *flags)
        system, user = prompt(dataset.home("marble"), window, rules=rules)
        assert f"--- system ---\n{system['content']}\n\n--- user ---\n{user['content']}\n" in text
        assert window.id in text


def test_the_flags_reach_the_reader(folder, capsys):
    assert run(capsys, f"marble:{folder}", "--transition", "label")[1]["labels"]["TRANSITION"] == 6
    assert '"time": "15:' in run(capsys, f"marble:{folder}", "--utc-offset", "3")[0]
    shown = {run(capsys, f"marble:{folder}", "--split-seed", str(seed))[0].split("of window ")[1].split("\n")[0] for seed in range(6)}
    assert len(shown) > 1
    assert "outgoing phone call" in run(capsys, f"marble:{folder}", "--smartphone")[0]


def test_a_data_set_without_events_has_no_prompt(tmp_path, capsys):
    environment(tmp_path / "A1a" / "instance1")
    text, result = run(capsys, f"marble:{tmp_path}")
    assert result["events"] == 0 and result["windows"] == {"train": 0, "validation": 0, "test": 0} and "there are no events" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "READER:PATH"),
        (["nosuch:PATH"], "unknown data 'nosuch:PATH'"),
        (["marble:/nowhere"], "there is no folder /nowhere"),
        (["marble:{folder}", "--unknown"], "unrecognized arguments: --unknown"),
        (["marble:{folder}", "--trans", "label"], "unrecognized arguments: --trans"),  # no abbreviations
        (["marble:{folder}", "--transition", "maybe"], "--transition"),
        (["marble:{folder}", "--utc-offset", "late"], "--utc-offset"),
        (["marble:{folder}", "--utc-offset", "99"], "--utc-offset"),
        (["marble:{folder}", "--tokenizer", "{folder}"], "has no tokenizer.json"),
    ],
)
def test_a_mistake_ends_with_2_and_one_sentence(folder, capsys, argv, message):
    assert main([part.format(folder=folder) for part in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_runs_by_command_line_without_torch(folder):
    code = "import sys; from harkd.homes.__main__ import main; code = main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, f"marble:{folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["events"] == 48
    module = subprocess.run([sys.executable, "-m", "harkd.homes", "nosuch:x"], cwd=ROOT, capture_output=True, text=True)
    assert module.returncode == 2 and module.stdout == "" and module.stderr.startswith("python -m harkd.homes: unknown data")


@needs_marble
@needs_qwen3
def test_counts_the_tokens_of_a_real_prompt(capsys):
    from tokenizers import Tokenizer

    text, result = run(capsys, f"marble:{MARBLE}", "--tokenizer", str(QWEN3))
    dataset = read(f"marble:{MARBLE}")
    system, user = (message["content"] for message in prompt(dataset.homes[0], next(dataset.windows("train"))))
    rendered = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    tokens = len(Tokenizer.from_file(str(QWEN3 / "tokenizer.json")).encode(rendered).ids)
    assert result["prompt_tokens"] == tokens and f"tokens      {tokens} in the prompt" in text
    assert (result["recordings"], result["events"], result["scored"]) == (20, 620, 455)
