"""The pretraining of the models that ship, on few homes: what is learnt, and that its stages end in a model."""

import json

import pytest
import torch

import harkd
from harkd.homes.answer import parse_answer
from harkd.homes.dataset import read
from harkd.homes.simulated import house
from tools import pretrain_nano
from tools.pretrain_nano import DRILLS, NAMING, SIZES, corpus, drill, lessons, main, make_tokenizer, naming


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrain_nano, "TOKENIZER_HOMES", 10)
    yield make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    patch.undo()


def learnt(tokenizer, example):
    """The text whose tokens count in the loss."""
    return tokenizer.decode([id for id, counts in zip(example.ids, example.mask) if counts])


def test_only_the_true_answers_are_learnt(tokenizer):
    thoughts = 0
    for number in range(20):
        found, dataset = lessons(number, 2), read(f"simulated:P{number}")
        by_id = {window.id: window for window in dataset.windows()}
        for (about, messages, thinking), example in zip(found, corpus(tokenizer, [found]), strict=True):
            *_, user, answer = messages
            text, events = learnt(tokenizer, example), json.loads(user["content"])
            assert answer["content"] in text and user["content"] not in text and answer["reasoning_content"] in text
            assert bool(answer["reasoning_content"]) == thinking
            thoughts += thinking
            if about in by_id:  # a run of events; the others are scattered
                parsed = parse_answer(text, by_id[about], dataset.homes[0].label_names)
                assert not parsed.causes and len(events) == len(by_id[about].events)
                assert all(label in event.labels for event, label in zip(by_id[about].events, parsed.labels) if event.labels)
    assert 0.6 < thoughts / 40 < 1


def test_the_names_are_what_a_home_calls_each_activity(tokenizer):
    for number in range(5):
        home, found = house(f"P{NAMING + number}"), naming(number)
        ((_, (system, _, answer), _),), (example,) = found, corpus(tokenizer, [found])
        told = {activity: label for activity, label in home.labels.items() if activity != "wake"}
        assert system["content"] == "\n".join(["# Activities", *(f"- {label}" for label in told.values())])
        assert sorted(answer["reasoning_content"].splitlines()) == sorted(f"{activity} {label}" for activity, label in told.items())
        assert answer["reasoning_content"] in learnt(tokenizer, example) and "# Activities" not in learnt(tokenizer, example)


def test_a_drill_tells_nothing_but_the_labels(tokenizer):
    for number in range(5):
        found, (home,) = drill(number), read(f"simulated:P{DRILLS + number}").homes
        ((_, (system, user, answer), thinking),) = found
        assert system["content"] == "\n".join(["# Activities", *(f"- {name}" for name in home.label_names)])
        assert 2 <= len(json.loads(user["content"])) == len(json.loads(answer["content"])) <= 5
        assert len(answer["reasoning_content"].splitlines()) in ((len(json.loads(answer["content"])),) if thinking else (0,))


def test_the_stages_end_in_a_model_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_nano, "TOKENIZER_HOMES", 10)
    monkeypatch.setitem(SIZES, "nano-student", (32, 32, 1, 1, 1))
    arguments = [str(tmp_path), "--names", "12", "--drills", "12", "--homes", "4", "--only", "nano-student"]
    assert main(arguments) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    losses = {record["stage"]: record["validation_loss"] for record in told if "validation_loss" in record}
    assert list(losses) == ["names", "drills", "homes", "more-homes"] and losses["more-homes"] < losses["names"]
    folder = tmp_path / "nano-student-more-homes"
    model, drilled = harkd.load_model(folder), harkd.load_model(tmp_path / "nano-student-drills")
    assert model.logits([1, 2, 3]).dtype == torch.float32 and model.config == drilled.config
    assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), drilled.parameters()))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0 and (folder / "model.safetensors").stat().st_mtime_ns == written and not capsys.readouterr().out
