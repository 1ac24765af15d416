"""python -m harkd.train: the ways to learn from a teacher, and validation by F1."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from harkd.distill.traces import TraceWriter, read_traces
from harkd.errors import UserError
from harkd.homes.answer import canonical
from harkd.homes.dataset import read
from harkd.lessons import TrainSettings, hold_out, lessons
from harkd.qwen3.tokenizer import load_tokenizer
from harkd.train import main
from tests.door_cases import LABELS, lines, mixed, model, outcome, run, short_prompts  # noqa: F401
from tests.train_cases import traces, truth  # noqa: F401


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


def test_the_flags_reach_the_loop(model, guided, tmp_path, monkeypatch):
    from harkd.distill.progress import Result

    asked = {}

    def loop(student, parameters, learn, validate, settings, folder, objective, **callables):
        asked.update({**vars(settings), **vars(objective), "twice": student.checkpoint_activations})
        return Result(step=1)

    monkeypatch.setattr("harkd.distill.loop.train", loop)
    numbers = {"beta": 0.2, "on_policy_fraction": 0.25, "packs_per_step": 2, "patience": 4, "lr": 0.01, "epochs": 5, "batch_tokens": 3000, "seed": 6}
    flags = [part for name, value in numbers.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags += ["--learn", "sequence=2,logits,on-policy", "--teacher", model, "--divergence", "jsd", "--teacher-temperature", 3, "--validate-f1", 7]
    run(main, "--model", model, "--traces", guided, "--train-on", "answer", "--out", tmp_path / "out", "--validation", 0.5, "--checkpoint-activations", *flags)
    expected = {**numbers, "ways": (("sequence", 2.0), ("logits", 1.0)), "divergence": "jsd", "temperature": 3.0, "f1_every": 7, "vocab_size": 345, "twice": True}
    assert {name: asked[name] for name in expected} == expected and asked["teacher"] is not None


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
    from harkd.sampling.request import BATCH, Sampling

    dataset, tokenizer = read(mixed), load_tokenizer(model)
    windows = list(dataset.windows("all"))[:4]
    examples = examples_from_truth(dataset.homes, windows, tokenizer)
    answers = [canonical([event.labels[0] if event.labels else "EATING" for event in window.events]) for window in windows]
    said = [*answers[:2], canonical(["EATING"] * len(windows[2].events)), answers[3]]

    class Told:
        def __init__(self, model, tokenizer, batch, cache_tokens):
            assert batch == BATCH and sum(len(e.ids) for e in examples) < cache_tokens < 8192  # one prefix, four answers: no 65,536

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
    with pytest.raises(UserError, match="needs held-out windows with events of one true label"):
        practice.f1(None, tokenizer, examples, {w: (offered, [(), tuple(offered[:2])]) for w, (offered, _) in truths.items()}, Sampling())
    assert practice.room(examples, 5000) == 5000 - max(len(e.prefix) + e.mask.index(True) for e in examples)


def test_ways_that_cannot_be_are_told(model, guided, traces, tmp_path):
    from tests.tiny import CORPUS, tiny_model
    from tools.pretrain_nano import save_tokenizer, train_tokenizer

    other = tiny_model(tmp_path / "other", num_hidden_layers=1)
    save_tokenizer(train_tokenizer([text.upper() for text in CORPUS], 330), other)
    small, short = (tiny_model(tmp_path / next(iter(size)), num_hidden_layers=1, **size) for size in ({"vocab_size": 344}, {"max_position_embeddings": 999}))
    argv = ["--model", model, "--train-on", "answer", "--out", tmp_path / "out"]
    for flags, words in (
        (["--traces", guided, "--learn", "logits", "--teacher", small], f"{small} has 344 ids and 4096 positions, and an example may need 345 and 4096"),
        (["--traces", guided, "--learn", "on-policy", "--teacher", short, "--batch-tokens", 2000], "384 ids and 999 positions, and an example may need 345 and 2000"),
        (["--traces", guided, "--learn", "logits"], "name its model with --teacher"), (["--traces", guided, "--teacher", model], "leave it out"),
        (["--traces", guided, "--learn", "logits", "--teacher", other], "have different tokenizers"), (["--traces", traces, "--learn", "labels"], "without the probabilities"),
        (["--traces", traces, "--learn", "sequence,labels"], "without the probabilities"),
        (["--traces", guided, "--learn", "sequence=much"], "'much' is not a number"), (["--traces", guided, "--learn", "magic"], "sequence, labels, logits"),
        (["--traces", guided, "--learn", "on-policy,logits", "--teacher", model, "--teacher-top-k", 4], "for --learn logits without on-policy"),
        (["--data", "marble:x", "--train-on", "truth", "--learn", "labels"], "the truth does not have"), (["--traces", guided, "--validate-f1", 1, "--validation", 0], "held-out windows"),
    ):  # fmt: skip
        code, _, _, err = outcome(main, *argv, *flags)
        assert code == 2 and words in err and err.strip().count("\n") == 0 and not (tmp_path / "out").exists(), err
