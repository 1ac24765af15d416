"""The pretraining of the models that ship, on few homes: what is learnt, and that its stages end in a model."""

import json

import pytest
import torch

import harkd
from harkd.homes.answer import parse_answer
from harkd.homes.dataset import read
from harkd.homes.prompt import system_message
from harkd.homes.simulated import house
from harkd.homes.simulated_world import first_word, plain
from tools import pretrain_nano
from tools.pretrain_nano import NAMES, PARTS, SIZES, WORDS, corpus, homes, known_words, main, make_tokenizer, names, parts, words


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
        found, dataset = homes(number, 1), read(f"simulated:P{number}")
        by_id = {window.id: window for window in dataset.windows()}
        for (about, messages, thinking, _), example in list(zip(found, corpus(tokenizer, [found]), strict=True))[1:]:
            system, user, answer = messages
            text, events = learnt(tokenizer, example), json.loads(user["content"])
            assert system["content"] == system_message(dataset.homes[0])
            assert answer["content"] in text and user["content"] not in text and answer["reasoning_content"] in text
            assert bool(answer["reasoning_content"]) == thinking
            thoughts += thinking
            if about in by_id:  # a run of events; the others are scattered
                parsed = parse_answer(text, by_id[about], dataset.homes[0].label_names)
                assert not parsed.causes and len(events) == len(by_id[about].events)
                assert all(label in event.labels for event, label in zip(by_id[about].events, parsed.labels) if event.labels)
        assert sum(lesson.about in by_id for lesson in found) == 1 and len(found) == 3
    assert 0.6 < thoughts / 40 < 1


def test_names_are_what_a_home_calls_each_activity_and_their_order_is_not_learnt(tokenizer):
    for number in range(5):
        home, found = house(f"P{NAMES + number}"), names(number)
        ((_, (system, _, answer), *_),), (example,) = found, corpus(tokenizer, [found])
        told = {plain(label): label for label in home.home.label_names}
        assert system["content"] == "\n".join(["# Activities", *(f"- {label}" for label in told.values())])
        lines = answer["reasoning_content"].splitlines()
        assert sorted(lines) == sorted(f"{activity} {label}" for activity, label in told.items()) and lines != sorted(lines)
        text = learnt(tokenizer, example)
        assert "\n".join(["<think>", *(f" {line.partition(' ')[2]}" for line in lines), "</think>"]) in text.replace("\n\n", "\n")
        assert "# Activities" not in text


def test_any_words_stand_behind_the_first_of_a_name(tokenizer):
    known, told, more, examples = known_words(tokenizer), set(), 0, []
    assert "kitchen" in known and known == sorted(set(known)) and not any(set("< \n\ufffd") & set(word) for word in known)
    for number in range(300):
        home, found = house(f"P{WORDS + number}"), words(number, known)
        ((_, (system, _, answer), *_),), (example,) = found, corpus(tokenizer, [found])
        lines = system["content"].partition("# Activities\n")[2].split("\n\n")[0].splitlines()
        said = dict(line.split(" ", 1) for line in answer["reasoning_content"].splitlines())
        assert len(lines) == len(said) == len(set(said.values()))
        for activity, label in said.items():
            assert any(line == f"- {label}" or line.startswith(f"- {label}: ") for line in lines)
            first, *others = label.replace("_", " ").split(" ")
            assert plain(label) == activity and others
            assert first in map(first_word, home.home.label_names)
        examples += [event["activity"] in said.values() for event in json.loads((system["content"].split("Output:\n") + ["[]"])[1])]
        told.update(example.prefix)
        more += "\n\n" in system["content"]
    assert 75 < more < 140  # half of them at most are told of in part
    assert all(examples) and len(examples) > 50  # an example uses the new names
    without = {id for lesson in map(names, range(300)) for id in corpus(tokenizer, [lesson])[0].prefix}
    assert len(told) > 0.8 * tokenizer.vocab_size > 4 * len(without)


def test_a_part_tells_the_activities_and_some_of_the_rest(tokenizer):
    seen = []
    for number in range(20):
        found, (home,) = parts(number), read(f"simulated:P{PARTS + number}").homes
        (_, (system, _, named), *_), (_, (same, user, answer), thinking, _) = found
        whole = system_message(home).split("\n\n")
        told = system["content"].split("\n\n")
        activities = [part for part in told if part.startswith("# Activities")]
        assert same == system and [line[2:].partition(":")[0] for line in activities[0].splitlines()[1:]] == list(home.label_names)
        assert all(part in whole for part in told if part not in activities)
        seen.append((len(told), ": " in activities[0], len(json.loads(user["content"]))))
        assert len(json.loads(user["content"])) == len(json.loads(answer["content"]))
        assert len(answer["reasoning_content"].splitlines()) in ((len(json.loads(answer["content"])),) if thinking else (0,))
    told, described, events = map(set, zip(*seen))
    assert len(told) >= 4 and described == {True, False} and events == set(range(2, 7))


def test_the_stages_end_in_a_model_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_nano, "TOKENIZER_HOMES", 10)
    monkeypatch.setitem(SIZES, "nano-student", (32, 32, 1, 1, 1))
    arguments = [str(tmp_path), "--names", "12", "--parts", "8", "--homes", "12", "--words", "3", "--only", "nano-student"]
    assert main(arguments) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    losses = {record["stage"]: record["validation_loss"] for record in told if "validation_loss" in record}
    assert list(losses) == ["names", "parts", "homes", "words"] and losses["homes"] < losses["names"]
    folder = tmp_path / "nano-student-words"
    model, before, earlier = (harkd.load_model(tmp_path / f"nano-student-{stage}") for stage in ("words", "homes", "parts"))
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), earlier.parameters()))
    assert model.logits([1, 2, 3]).dtype == torch.float32 and model.config == before.config
    assert all(not torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters()))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0 and (folder / "model.safetensors").stat().st_mtime_ns == written and not capsys.readouterr().out
