"""What the README shows is run: its Python, and its grid of sizes, on tiny models and hand-made homes. Its flags exist."""

import re
import shlex
import subprocess
import sys

import pytest

from harkd.eval import main as evaluate
from tests.door_cases import run
from tests.helpers import ROOT
from tests.marble_files import marble
from tests.reader_cases import write
from tests.test_reader_mural import FILES
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
    """Those of a command in that program, those that stand alone in one of them."""

    def flags(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", text))

    known = {"--help", "--nproc-per-node"}  # the second is torchrun's
    commands = re.findall(r"-m ((?:harkd|tools)\.\w+)([^`\n&;|#]*)", README.replace("\\\n", " "))
    assert len(programs := {name for name, _ in commands}) > 10
    for program in programs:
        text = subprocess.run([sys.executable, "-m", program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name, shown in commands:
            assert name != program or flags(shown) <= flags(text), (name, flags(shown) - flags(text))
        known |= flags(text)
    assert flags(README) <= known, flags(README) - known


def test_the_grid_of_sizes_is_one_command(tmp_path):
    """With two tiny models in place of the six, on hand-made recordings: rows of both data sets, and F1 against size for each."""
    pytest.importorskip("matplotlib")
    (block,) = (block for block in blocks("sh") if "runs/sizes" in block)
    command = shlex.split(block.replace("\\\n", " "))
    models = [command[n + 1] for n, word in enumerate(command) if word == "--model"][2:]
    assert models == [f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")]
    tiny = [tiny_model(tmp_path / f"tiny{width}", num_hidden_layers=1, intermediate_size=width, max_position_embeddings=16_384) for width in (32, 64)]
    data = {"marble:PATH": f"marble:{marble(tmp_path / 'marble')}", "mural:PATH": f"mural:{write(tmp_path / 'mural', FILES)}", "runs/sizes": f"{tmp_path}/sizes"}
    swapped = data | {model: str(tiny[n % 2]) for n, model in enumerate(models)}
    result = run(evaluate, *[swapped.get(word, word) for word in command[3:]], "--max-new-tokens", 4)
    named = {(row["data"], row["name"]): row for row in result["models"]}
    assert len(named) == 2 * 4 and {name for name, _ in named} == {data["marble:PATH"], data["mural:PATH"]}
    small, large = (named[data["mural:PATH"], f"{path.name} with reasoning"] for path in tiny)
    assert 0 < small["parameters"] < large["parameters"] and min(small["seconds_per_window"], large["seconds_per_window"]) > 0
    report = (tmp_path / "sizes/report.md").read_text()
    assert all(f"report-size-{n}.png" in report and (tmp_path / f"sizes/report-size-{n}.png").exists() for n in (1, 2))
