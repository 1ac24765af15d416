"""python -m harkd.train: what is learnt, what is held out, what a killed run ends with, and what is exported."""

import json
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch

from harkd.distill.traces import Trace, TraceWriter, agreement, read_traces
from harkd.errors import UserError
from harkd.eval import main as evaluate
from harkd.generate import main as generate
from harkd.homes.answer import canonical
from harkd.homes.dataset import group_digest, read
from harkd.homes.prompt import prompt
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.doors import enter
from harkd.lessons import TrainSettings, hold_out, lessons
from harkd.train import main
from tests.door_cases import LABELS, child, content, data, kill, lines, mixed, model, one_thread, outcome, run, short_prompts  # noqa: F401

FILES = {"settings.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "previous.safetensors", "adapter_config.json", "adapter_model.safetensors", "harkd.json", "cost.json", "result.json"}


@pytest.fixture
def truth(model, mixed, tmp_path):
    return ["--model", model, "--train-on", "truth", "--data", mixed, "--out", tmp_path / "out", "--lr", 0.03, "--batch-tokens", 3000, "--epochs", 2]


@pytest.fixture(scope="module")
def traces(mixed, tmp_path_factory):
    """Two samples of every training window: the first right, the second wrong in its last events, that of the last window cut off."""
    folder, dataset = tmp_path_factory.mktemp("traces"), read(mixed)
    windows = list(dataset.windows("train"))
    with TraceWriter(folder) as writer:
        for window in windows:
            true = [list(event.labels) for event in window.events]
            right = [labels[0] if labels else "EATING" for labels in true]
            for sample, labels in enumerate((right, [right[0]] + ["EATING"] * (len(right) - 1))):
                turn = {"role": "assistant", "reasoning_content": f"The fridge {sample}.", "content": f"So:\n{canonical(labels)}"}
                cut_off = sample == 1 and window is windows[-1]
                writer.write(
                    Trace(
                        data=mixed, home=window.home, group=window.group, recording=window.recording, window=window.id, sample=sample, labels=list(LABELS),
                        messages=[*prompt(dataset.homes[0], window), turn], answer=[None] * len(labels) if cut_off else labels, causes={}, truth=true,
                        agreement=0.0 if cut_off else agreement(labels, true), tokens={"prompt": 1, "completion": 9}, finish_reason="length" if cut_off else "stop",
                        seed=0, model="teacher", thinking=True, template="1", answer_form="1",
                    )  # fmt: skip
                )
    return folder


def losses(out):
    return [record["loss"] for record in lines(out / "metrics.jsonl") if "loss" in record]


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
        ("--train-on", "reasoning"): windows + windows // 2, ("--train-on", "answer", "--keep", "best"): windows, ("--train-on", "answer", "--keep", "all"): 2 * windows - 1,
        ("--keep", "correct", "--min-agreement", "0.3"): windows + windows // 2 + 1,
    }.items()):  # fmt: skip
        code, result, text, err = outcome(main, *argv, *flags, "--out", tmp_path / str(number))
        assert code == 0, err
        texts[flags] = text
        kept = int(text.split("kept ")[1].split(" ")[0])
        assert result["examples"] + result["validation_examples"] == kept and "1 cut off by length" in text
        assert json.loads((tmp_path / str(number) / "harkd.json").read_text())["thinking"] == ("answer" not in flags)
        if flags[-1] in ("best", "all"):
            assert kept == examples
    text = texts["--train-on", "reasoning"]
    assert f"what --keep correct would keep of {2 * windows} traces" in text and "agreement at least" in text and "COOKING" in text
    assert "{+<think>\nThe fridge" in text and "So:" not in text  # the answer is written again
    assert "{+[{" in texts["--train-on", "answer", "--keep", "best"] and "The fridge" not in texts["--train-on", "answer", "--keep", "best"]
    table = [line.split() for line in text.splitlines() if line.startswith("traces ")][0]
    assert int(table[-1]) == int(text.split("kept ")[1].split(" ")[0])  # --min-agreement 1 is what was kept


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


def test_killed_and_continued_it_ends_with_the_same_bytes(truth, one_thread, tmp_path):
    truth = [*truth, "--epochs", 30, "--limit", 6, "--lora-rank", 2]
    whole = run(main, *truth, "--out", tmp_path / "whole")
    out, codes = tmp_path / "killed", []
    for steps in (1, 25):
        code, _, _ = kill(child("train", *truth, "--out", out), lambda: (out / "metrics.jsonl").exists() and len(losses_so_far(out)) >= steps)
        codes.append(code)
    assert codes[0] == -signal.SIGKILL and not (out / "result.json").exists()
    code, result, _, _ = outcome(main, *truth, "--out", out)
    assert code == 0 and {**result, "out": ""} == {**whole, "out": ""}
    assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole/adapter_model.safetensors").read_bytes()
    assert losses(out) == losses(tmp_path / "whole")


def losses_so_far(out):
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]


def test_again_it_is_done(truth, tmp_path):
    first = run(main, *truth, "--epochs", 1, "--limit", 2)
    before = content(tmp_path / "out")
    code, result, _, err = outcome(main, *truth, "--epochs", 1, "--limit", 2)
    assert code == 0 and result == first and "is done" in err and content(tmp_path / "out") == before
    code, _, _, err = outcome(main, *truth, "--epochs", 2, "--limit", 2)
    assert code == 2 and "epochs: 1, now 2" in err and content(tmp_path / "out") == before
    assert outcome(main, *truth, "--epochs", 2, "--overwrite", "--data", "marble:/nowhere")[0] == 2 and content(tmp_path / "out") == before
    assert run(main, *truth, "--epochs", 2, "--limit", 2, "--overwrite")["step"] == 2


def copied(data, folder):
    shutil.copytree(data.removeprefix("marble:"), folder)
    return f"marble:{folder}"


@pytest.mark.parametrize("door", ["train", "eval", "generate"])
def test_data_that_changed_are_other_settings(model, mixed, tmp_path, door):
    mixed = copied(mixed, tmp_path / "data")
    argv = ["--model", model, "--data", mixed, "--limit", 1, *(["--train-on", "truth", "--epochs", 1] if door == "train" else ["--max-new-tokens", 2])]
    door = {"train": main, "eval": evaluate, "generate": generate}[door]
    first = run(door, *argv, "--out", tmp_path / "data/runs/out")
    (tmp_path / "data/.hidden").write_text("x")
    assert run(door, *argv, "--out", tmp_path / "data/runs/out") == first  # nor does the run in it make it another one
    path = tmp_path / "data/A1a/instance8/environmental.csv"
    path.write_bytes(path.read_bytes().replace(b"R7", b"E2"))
    code, _, _, err = outcome(door, *argv, "--out", tmp_path / "data/runs/out")
    assert code == 2 and f"other settings (inputs.{mixed}: " in err and err.count("\n") == 1


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


def test_f1_asks_about_every_held_out_window(model, traces, tmp_path):
    """Also those of which no trace is kept, once each."""
    kept = [trace for trace in read_traces(traces) if trace.sample == 0]
    held_out = {trace.window for trace in hold_out(kept, 0.5, 0)[1]}
    with TraceWriter(tmp_path / "traces") as writer:
        for trace in read_traces(traces):
            wrong = trace.window in sorted(held_out)[1:]
            writer.write(replace(trace, answer=[None] * len(trace.answer), agreement=0.0) if wrong else trace)
    for train_on in ("answer", "reasoning"):
        settings = TrainSettings(model, "out", str(tmp_path / "traces"), train_on, validation=0.5, validate_f1=1)
        found = lessons(settings, load_tokenizer(model))
        assert {example.window for example in found.validate} == {min(held_out)} and {e.window for e in found.asked} == held_out == set(found.truth)
        assert len(found.asked) == len(held_out) and not held_out & {example.window for example in found.learn}
        first = next(example for example in found.asked if example.window == min(held_out))
        prompt, asked = (example.ids[: example.mask.index(True)] for example in (found.validate[0], first))
        assert prompt == asked and first.prefix == found.validate[0].prefix
        assert lessons(replace(settings, validate_f1=0), load_tokenizer(model)).asked == []


def test_started_again_by_torchrun_it_goes_on(truth, tmp_path, monkeypatch):
    truth = [*truth, "--epochs", 1, "--limit", 2]
    run(main, *truth)
    before = content(tmp_path / "out")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "is done" in outcome(main, *truth, "--overwrite")[3] and content(tmp_path / "out") == before


def test_interrupted_it_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    for argv, words in (([], "the same command goes on"), (["--overwrite"], "the same command without --overwrite goes on")):
        assert enter("harkd.train", interrupted, argv) == 130 and words in capsys.readouterr().err


def test_what_cannot_be_trained_costs_no_older_run(truth, model, mixed, tmp_path):
    from tests.tiny import tiny_model

    run(main, *truth, "--epochs", 1, "--limit", 2)
    before = content(tmp_path / "out")
    few = tiny_model(tmp_path / "few", num_hidden_layers=1, max_position_embeddings=400)
    small = tiny_model(tmp_path / "small", num_hidden_layers=1, vocab_size=300)
    for flags, words in (
        (["--batch-tokens", 400], "raise --batch-tokens (now 400)"), (["--dtype", "float16"], "float16 cannot hold gradients"),
        (["--device", "nonsense"], "the device 'nonsense' cannot be used here"), (["--model", few], "and the model 400 positions"),
        (["--model", small], "they do not belong together"),
    ):  # fmt: skip
        code, _, _, err = outcome(main, *truth, *flags, "--overwrite")
        assert code == 2 and words in err and content(tmp_path / "out") == before


def test_traces_that_changed_are_other_settings(model, traces, tmp_path):
    copy = tmp_path / "traces"
    copy.mkdir()
    for name in ("traces.jsonl", "prompts.jsonl"):
        (copy / name).write_bytes((traces / name).read_bytes())
    argv = ["--model", model, "--traces", copy, "--train-on", "answer", "--epochs", 1, "--out", tmp_path / "out"]
    run(main, *argv)
    kept = (copy / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "traces.jsonl").write_bytes(b"".join(kept[:-3]))
    code, _, _, err = outcome(main, *argv)
    assert code == 2 and "traces.jsonl: " in err and "--overwrite" in err


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_export(truth, tied, tmp_path):
    from tests.tiny import tiny_model, transformers_model

    base = tiny_model(tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=tied)
    truth = [*truth, "--model", base, "--epochs", 3, "--limit", 4, "--export", tmp_path / "merged/model"]
    result = run(main, *truth)
    assert result["export"] == str(tmp_path / "merged/model") and [path.name for path in (tmp_path / "merged").iterdir()] == ["model"]
    ids = torch.tensor(load_tokenizer(tmp_path / "merged/model").encode('{"event_id": 1, "activity": "COOKING"}'))
    plain, adapted, merged = (load_model(*ref).logits(ids) for ref in ((base,), (base, None, None, tmp_path / "out"), (tmp_path / "merged/model",)))
    assert torch.allclose(adapted, merged, atol=1e-4) and not torch.allclose(plain, merged, atol=1e-2)
    with torch.no_grad():
        assert torch.allclose(transformers_model(tmp_path / "merged/model")(ids[None]).logits[0], merged, atol=1e-4)

    before = content(tmp_path / "merged/model")
    assert run(main, *truth) == result and content(tmp_path / "merged/model") == before  # the same command once more
    assert run(main, *truth, "--export", tmp_path / "second")["export"] == str(tmp_path / "second")
    second = content(tmp_path / "second")
    assert second["model.safetensors"] == before["model.safetensors"]
    code, _, _, err = outcome(main, *truth, "--export", tmp_path / "out")
    assert code == 2 and "is the run's own folder" in err
    assert "cannot be written" in outcome(main, *truth, "--export", base / "config.json/merged")[3]


def test_a_full_export_folder_is_told_before_training(truth, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    code, _, _, err = outcome(main, *truth, "--export", tmp_path / "full")
    assert code == 2 and "is not empty: name another folder with --export" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and content(tmp_path / "full") == {"thesis.txt": b"mine"}


def test_an_export_that_cannot_be_written_is_told_before_training(truth, tmp_path):
    (tmp_path / "file").write_text("x")
    for export, words in (("out", "the run's own folder"), ("out/../out", "own folder"), (".", "or holds it"), ("file/merged", "cannot be written")):
        code, _, _, err = outcome(main, *truth, "--export", tmp_path / export)
        assert code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_damaged_note_of_an_export_is_told(truth, tmp_path):
    truth = [*truth, "--epochs", 1, "--limit", 1, "--validation", 0, "--export", tmp_path / "merged"]
    run(main, *truth)
    (tmp_path / "merged/harkd.json").write_text("{")
    code, _, _, err = outcome(main, *truth)
    assert code == 2 and "merged/harkd.json cannot be read" in err


# ways to learn


@pytest.fixture(scope="module")
def guided(traces, tmp_path_factory):
    """A few of the traces, with the teacher's probabilities: a little doubt everywhere."""
    folder = tmp_path_factory.mktemp("guided")
    with TraceWriter(folder) as writer:
        for trace in [trace for trace in read_traces(traces) if trace.sample == 0][:6]:
            doubt = [{label: 0.8 if label == answered else 0.1 for label in LABELS} for answered in trace.answer]
            writer.write(replace(trace, probabilities=doubt))
    return folder


@pytest.mark.parametrize(
    ("learn", "ways", "flags"),
    [("labels", {"labels"}, []), ("sequence,labels=0.5", {"sequence", "labels"}, ["--cap", 2]), ("logits", {"logits"}, ["--divergence", "jsd", "--teacher-temperature", 2, "--teacher-top-k", 20]),
     ("on-policy,labels", {"labels", "on-policy"}, ["--max-new-tokens", 8, "--checkpoint-activations"])],
)  # fmt: skip
def test_each_way_to_learn(model, guided, tmp_path, learn, ways, flags):
    from tests.tiny import tiny_model

    teacher = tiny_model(tmp_path / "teacher", seed=5, num_hidden_layers=1, vocab_size=400)  # its head is padded further
    flags = [*flags, *(["--teacher", teacher] if {"logits", "on-policy"} & ways else [])]
    argv = ["--model", model, "--traces", guided, "--train-on", "answer", "--learn", learn, "--epochs", 4, "--lr", 0.01, "--validation", 0, "--batch-tokens", 2600, *flags]
    code, result, text, err = outcome(main, *argv, "--out", tmp_path / "out")
    assert code == 0, err
    steps = [record for record in lines(tmp_path / "out/metrics.jsonl") if "loss" in record]
    assert {way for record in steps for way in record["ways"]} == ways and all(record["loss"] > 0 for record in steps)
    assert json.loads((tmp_path / "out/harkd.json").read_text())["learn"] == learn
    of = Counter(label for trace in read_traces(guided) for label in {label for labels in trace.truth for label in labels})
    assert result["examples"] == int(text.split("kept ")[1].split(" ")[0]) == (2 if "--cap" in flags else 6)
    assert {label: of for label, (_, of) in result["yield"].items()} == of and all(0 < kept <= of for kept, of in result["yield"].values())
    if flags:  # a teacher, or text of the student's own: drawn alike
        assert run(main, *argv, "--out", tmp_path / "again") == {**result, "out": str(tmp_path / "again")}
        assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (tmp_path / "out/adapter_model.safetensors").read_bytes()


def test_validation_by_f1(truth, tmp_path):
    result = run(main, *truth, "--epochs", 2, "--validate-f1", 1, "--max-new-tokens", 4)
    found = [record["validation_f1"] for record in lines(tmp_path / "out/metrics.jsonl") if "validation_f1" in record]
    assert len(found) == result["step"] and result["best_f1"] == max(found) == found[result["best_f1_step"] - 1]
    assert (tmp_path / "out/best-f1.safetensors").exists()


def test_what_a_student_writes_follows_its_prompt_and_is_scored(model, mixed):
    """Against a generator that says what it is told: the right answer for half of the windows, and never an end for the last."""
    from harkd import practice
    from harkd.distill.examples import examples_from_truth
    from harkd.sampling.generator import Completion
    from harkd.sampling.request import Sampling

    dataset, tokenizer = read(mixed), load_tokenizer(model)
    windows = list(dataset.windows("all"))[:4]
    examples = examples_from_truth(dataset.homes, windows, tokenizer)
    answers = [canonical([event.labels[0] if event.labels else "EATING" for event in window.events]) for window in windows]
    said = [*answers[:2], canonical(["EATING"] * len(windows[2].events)), answers[3]]

    class Told:
        def __init__(self, model, tokenizer, batch, cache_tokens):
            assert batch == 16 and sum(len(e.ids) for e in examples) < cache_tokens < 8192  # one prefix, four answers: no 65,536

        def generate(self, requests):
            for asked in reversed(list(requests)):
                ids = tokenizer.encode(said[asked.sample])
                yield Completion(asked, said[asked.sample], ids, [], "length" if asked.sample == 3 else "stop", 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harkd.sampling.generator.Generator", Told)
        written = practice.rollout(None, tokenizer, Sampling(max_new_tokens=500))(examples, 7)
        truths = {window.id: (LABELS, [event.labels for event in window.events]) for window in windows}
        value = practice.f1(None, tokenizer, examples, truths, Sampling(max_new_tokens=500))()
    for made, example, text, end in zip(written, examples, said, ("<|im_end|>",) * 3 + ("",), strict=True):
        first = example.mask.index(True)
        assert made.ids[:first] == example.ids[:first] and made.prefix == example.prefix
        assert tokenizer.decode(made.ids[first:]) == text + end and made.mask == [False] * first + [True] * (len(made.ids) - first)
    scored = [(event.labels, label) for window, text, n in zip(windows, said, range(4)) for event, label in zip(window.events, json.loads(text)) if event.labels]
    right = [(true, label["activity"] if n < len(scored) - sum(bool(e.labels) for e in windows[3].events) else None) for n, (true, label) in enumerate(scored)]
    from harkd.scoring.metrics import score

    assert value == score([true for true, _ in right], [label for _, label in right], LABELS).weighted_f1 and 0 < value < 1
    with pytest.raises(UserError, match="needs held-out windows with true labels"):
        practice.f1(None, tokenizer, examples, {w: (offered, [()]) for w, (offered, _) in truths.items()}, Sampling())
    assert practice.room(examples, 5000) == 5000 - max(len(e.prefix) + e.mask.index(True) for e in examples)


def test_ways_that_cannot_be_are_told(model, guided, traces, tmp_path):
    from tests.tiny import CORPUS, tiny_model
    from tools.pretrain_nano import save_tokenizer, train_tokenizer

    other = tiny_model(tmp_path / "other", num_hidden_layers=1)
    save_tokenizer(train_tokenizer([text.upper() for text in CORPUS], 330), other)
    argv = ["--model", model, "--train-on", "answer", "--out", tmp_path / "out"]
    for flags, words in (
        (["--traces", guided, "--learn", "logits"], "name its model with --teacher"), (["--traces", guided, "--teacher", model], "leave it out"),
        (["--traces", guided, "--learn", "logits", "--teacher", other], "have different tokenizers"), (["--traces", traces, "--learn", "labels"], "without the probabilities"),
        (["--traces", traces, "--learn", "sequence,labels"], "without the probabilities"),
        (["--traces", guided, "--learn", "sequence=much"], "'much' is not a number"), (["--traces", guided, "--learn", "magic"], "sequence, labels, logits"),
        (["--traces", guided, "--learn", "on-policy,logits", "--teacher", model, "--teacher-top-k", 4], "for logits alone"),
        (["--data", "marble:x", "--train-on", "truth", "--learn", "labels"], "the truth does not have"), (["--traces", guided, "--validate-f1", 1, "--validation", 0], "held-out windows"),
    ):  # fmt: skip
        code, _, _, err = outcome(main, *argv, *flags)
        assert code == 2 and words in err and err.strip().count("\n") == 0 and not (tmp_path / "out").exists(), err
