"""What the README shows is run: its Python, on a tiny model and a hand-made home. Its flags exist."""

import re
import subprocess
import sys

from tests.helpers import ROOT
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
    known = {"--help"}
    for door in ("harkd.generate", "harkd.train", "harkd.eval", "harkd.homes", "harkd.recognize", "tools.make_checkpoint", "tools.robustness"):
        text = subprocess.run([sys.executable, "-m", door, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known |= set(re.findall(r"--[a-z][a-z-]+", text))
    assert shown and shown <= known, shown - known
