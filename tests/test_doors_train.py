"""python -m harkd.train: what is learnt, what is held out, and what is noted."""

import json
from pathlib import Path

from harkd.eval import main as evaluate
from harkd.homes.answer import canonical
from harkd.homes.dataset import group_digest, read
from harkd.lessons import hold_out
from harkd.train import main
from tests.door_cases import lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.train_cases import losses, traces, truth  # noqa: F401

FILES = {".lock", "settings.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "previous.safetensors", "adapter_config.json", "adapter_model.safetensors", "harkd.json", "cost.json", "result.json"}


def test_the_truth_is_learnt(truth, model, tmp_path):
    code, result, text, _ = outcome(main, *truth, "--epochs", 30, "--limit", 4, "--validation", 0, "--lora-alpha", 16, "--target-modules", "q_proj, o_proj,up_proj,down_proj")
    out = tmp_path / "out"
    assert code == 0 and losses(out)[-1] < 0.5 * losses(out)[0]
    assert {path.name for path in out.iterdir()} == FILES
    assert result["examples"] == 4 and result["validation_examples"] == 0 and result["best_loss"] is None and result["step"] == 30
    notes = json.loads((out / "harkd.json").read_text())
    assert {name: notes[name] for name in ("base", "template", "thinking", "answer_form", "train_on")} == {
        "base": model, "template": "1", "thinking": False, "answer_form": "1", "train_on": "truth",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (16, 16.0, ["q_proj", "o_proj", "up_proj", "down_proj"])
    assert "4 examples to train on, 0 to validate on" in text


def test_the_example_is_shown_with_its_mask(truth, mixed):
    _, _, text, _ = outcome(main, *truth, "--epochs", 1, "--validation", 0)
    windows = list(read(mixed).windows("train"))
    first = canonical([event.labels[0] for event in windows[0].events[:7]])[:-1]
    assert f"{{+{first}" in text and "<|im_end|>+}" in text
    assert '"activity": "+}EATING{+"' in text  # two events without a label, answered but not learnt


def test_reasoning_and_answers_of_traces(model, traces, tmp_path):
    argv = ["--model", model, "--traces", traces, "--epochs", 1, "--lr", 0.01]
    windows = len(lines(traces / "traces.jsonl")) // 2
    texts = {}
    for number, (flags, examples) in enumerate({
        ("--train-on", "reasoning"): windows, ("--train-on", "answer", "--keep", "best"): windows, ("--train-on", "answer", "--keep", "all"): 2 * windows - 1,
        ("--keep", "correct", "--min-agreement", "0.3"): 2 * windows - 1,
    }.items()):  # fmt: skip
        code, result, text, err = outcome(main, *argv, *flags, "--out", tmp_path / str(number))
        assert code == 0, err
        texts[flags] = text
        kept = int(text.split("kept ")[1].split(" ")[0])
        assert result["examples"] + result["validation_examples"] == kept and "1 cut off by length" in text
        assert json.loads((tmp_path / str(number) / "harkd.json").read_text())["thinking"] == ("answer" not in flags)
        assert kept == examples
    text = texts["--train-on", "reasoning"]
    assert f"what --keep correct would keep of {2 * windows} traces" in text and "agreement at least" in text and "COOKING" in text
    assert "{+<think>\nThe fridge" in text and "So:" not in text  # the answer is written again
    assert "{+[{" in texts["--train-on", "answer", "--keep", "best"] and "The fridge" not in texts["--train-on", "answer", "--keep", "best"]
    table = [line.split() for line in text.splitlines() if line.startswith("traces ")][0]
    assert int(table[-3]) == int(text.split("kept ")[1].split(" ")[0])  # of 0.5, 0.6 ... 1.0, --min-agreement 0.8 is what was kept


def test_validation_holds_out_whole_groups(mixed):
    windows = list(read(mixed).windows("all"))
    drawn = set()
    for seed in range(5):
        for fraction, groups in ((0.1, 1), (0.25, 2), (0.5, 4), (0.99, 7), (0, 0)):
            learn, validate = hold_out(iter(windows), fraction, seed)
            assert not {w.group for w in learn} & {w.group for w in validate} and len({w.group for w in validate}) == groups
            assert sorted(w.id for w in learn + validate) == sorted(w.id for w in windows)
            drawn.add(tuple(sorted({w.group for w in validate})))
    assert len(drawn) > 8
    one_group = [window for window in windows if window.group == windows[0].group]
    assert hold_out(one_group, 0.5, 0) == (one_group, [])


def test_the_groups_trained_on_are_noted_and_eval_warns_of_them(truth, model, mixed, tmp_path):
    run(main, *truth, "--epochs", 1, "--limit", 3, "--validation", 0)
    notes = json.loads((tmp_path / "out/harkd.json").read_text())
    windows = list(read(mixed).windows("train"))
    assert notes["data"] == [mixed] and notes["groups"] == sorted({group_digest(window) for window in windows[:3]}) and len(notes["groups"]) == 2
    argv = ["--model", model, "--adapter", tmp_path / "out", "--data", mixed, "--max-new-tokens", 1, "--out"]
    groups = len({window.group for window in windows})
    told = f"warning: the adapter {tmp_path / 'out'} was trained on 2 of the {groups} groups"
    assert told in outcome(evaluate, *argv, tmp_path / "seen", "--split", "train")[3]
    assert "warning" not in outcome(evaluate, *argv, tmp_path / "new", "--split", "test")[3]


def test_what_is_not_asked_for_is_chosen_by_the_model_and_noted(truth, model, tmp_path):
    """An ordinary model: rank 16, alpha 32, and a rate of 0.2 over its width. Those of the models that ship: test_embedded.py."""
    plain = [argument for name, argument in zip(truth[::2], truth[1::2]) if name not in ("--lr", "--batch-tokens", "--epochs") for argument in (name, argument)]
    assert outcome(main, *plain, "--limit", 2)[0] == 0
    asked = json.loads((tmp_path / "out/settings.json").read_text())
    chosen = {name: asked[name] for name in ("lora_rank", "lora_alpha", "epochs", "batch_tokens", "validation", "lr")}
    width = json.loads((Path(model) / "config.json").read_text())["hidden_size"]
    assert chosen == {"lora_rank": 16, "lora_alpha": 32.0, "epochs": 3, "batch_tokens": 8192, "validation": 0.1, "lr": 0.2 / width}
