"""What the README shows is run: its Python here, on a tiny model and a hand-made home; its main job, by command line on the real recordings, where they are at hand."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers import MARBLE, QWEN3, ROOT, SHARED, needs_marble, needs_qwen3
from tests.marble_files import marble
from tests.tiny import tiny_model

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_python_examples_run_one_after_the_other(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    data = marble(tmp_path / "home")
    examples = blocks("python")
    assert len(examples) >= 3
    names = {}
    for example in examples:
        code = example.replace("Qwen/Qwen3-0.6B", str(model)).replace("marble:PATH", f"marble:{data}").replace("max_new_tokens=256", "max_new_tokens=8")
        code = code.replace("runs/", f"{tmp_path}/runs/")
        exec(compile(code, "README.md", "exec"), names)  # our own README
    assert names["logits"].shape == (len(names["ids"]), names["model"].config.vocab_size)
    assert len(names["predictions"]) == len(names["truth"]) == names["scores"].events > 0
    assert names["counts"]["traces"] == names["counts"]["wanted"] == 1 and (tmp_path / "runs/traces/traces.jsonl").exists()
    assert [one.activity in names["home"].label_names for one in names["found"]] == [True] * len(names["windows"][0].events)
    assert "PATH" not in capsys.readouterr().out


def test_every_flag_of_the_readme_exists():
    shown = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README))
    known = {"--help", "--nproc-per-node"}  # the second is torchrun's
    for door in ("harkd.generate", "harkd.train", "harkd.eval", "harkd.homes", "harkd.recognize", "tools.make_checkpoint", "tools.robustness"):
        text = subprocess.run([sys.executable, "-m", door, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known |= set(re.findall(r"--[a-z][a-z-]+", text))
    assert shown and shown <= known, shown - known


def main_job() -> list[list[str]]:
    """The commands of the README's block that makes a checkpoint."""
    (block,) = (block for block in blocks("sh") if "make_checkpoint" in block)
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [command for command in commands if command]


@pytest.mark.slow
@needs_marble
@needs_qwen3
def test_the_main_job_on_the_real_recordings(tmp_path):
    """Traces are written, the truth of 20 training windows is learnt to 95 % of their labels, and model, adapter and both baselines are scored."""
    assert MARBLE == SHARED / "data/marble/dataset" and QWEN3 == SHARED / "qwen3"
    results = []
    for command in main_job():
        assert command[:2] == ["python", "-m"]
        arguments = [part.replace("PATH", str(SHARED)).replace("runs/", f"{tmp_path}/") for part in command[1:]]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        results.append(done.stdout.splitlines()[-1])
    traces, adapter, scores = map(json.loads, results[1:])
    assert traces["traces"] == traces["wanted"] > 0
    assert adapter["examples"] >= 19
    base, adapted, majority, sensor = scores["models"]
    assert adapted["accuracy"] >= 0.95 and adapted["malformed"] == 0 and adapted["missing"] == 0
    assert base["accuracy"] == 0 and 0 < majority["accuracy"] < sensor["accuracy"] < adapted["accuracy"]
