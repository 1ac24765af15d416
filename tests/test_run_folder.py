"""A run folder belongs to one process at a time, and to one run."""

import gc
import subprocess
import sys

import pytest

from harkd.doors import RunFolder
from harkd.errors import UserError
from harkd.files import read_json
from harkd.generate import main
from harkd.homes import simulated
from harkd.homes.dataset import content_digest
from tests.door_cases import data, model, outcome, short_prompts  # noqa: F401
from tests.helpers import ROOT

BEGUN = """
import sys
from harkd.doors import RunFolder
folder = RunFolder(sys.argv[1], "generate", {}, True, ["*.jsonl"], {})
folder.begin()
print("ready", flush=True)
sys.stdin.readline()
folder.finish({})
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has begun in `out`; a line ends its run, another one itself."""
    argv = [sys.executable, "-c", BEGUN, str(tmp_path / "out")]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_has_ended(other, model, data, tmp_path):
    out = tmp_path / "out"
    (out / "traces.jsonl").write_text("{}\n")
    code, _, _, err = outcome(main, "--model", model, "--data", data, "--out", out, "--max-new-tokens", 6, "--overwrite")
    told = f"harkd.generate: another process is at work in {out}: wait for it, end it, or give another --out"
    assert code == 2 and err.splitlines()[-1] == told
    folder = RunFolder(out, "generate", {}, True, ["*.jsonl"], {})
    with pytest.raises(UserError, match="another process is at work"):
        folder.begin()
    assert (out / "traces.jsonl").read_text() == "{}\n"
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "done\n"
    folder.begin()
    assert not (out / "traces.jsonl").exists()


def test_a_killed_process_holds_nothing(other, tmp_path):
    other.kill()
    other.wait()
    RunFolder(tmp_path / "out", "generate", {}, True, [], {}).begin()


def test_a_process_may_begin_again_behind_an_error_and_keeps_others_out(tmp_path):
    first, second = (RunFolder(tmp_path / "out", "generate", {}, False, [], {}) for _ in range(2))
    first.begin()
    second.begin()
    del first
    gc.collect()
    done = subprocess.run([sys.executable, "-c", BEGUN, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "another process is at work" in done.stderr and not done.stdout


def test_a_run_that_came_and_went_while_a_model_was_loaded_is_kept(tmp_path):
    one, other = (RunFolder(tmp_path / "out", "generate", {"limit": n}, False, ["*.jsonl"], {}) for n in (1, 2))
    one.begin()
    one.finish({})
    with pytest.raises(UserError, match="holds a run with other settings"):
        other.begin()
    assert read_json(tmp_path / "out/settings.json")["limit"] == 1


def test_another_simulator_is_other_data(monkeypatch):
    digest = content_digest("simulated")
    assert digest == content_digest("simulated:D0") != content_digest("simulated:D1")
    monkeypatch.setattr(simulated, "MERGES", 1.0)
    assert content_digest("simulated") != digest
