"""Every way to learn against its definition in float64, its zero, the whole vocabulary, and a tiny model that learns by it."""

import copy
import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from harkd.distill.examples import Choice, examples_from_traces
from harkd.distill.loop import LoopSettings, train
from harkd.distill.losses import Objective, accumulate, pack_losses, validation_loss
from harkd.distill.packing import collate
from harkd.distill.teacher import with_top_k
from harkd.errors import UserError
from harkd.homes.answer import canonical
from harkd.qwen3.tokenizer import read_tokenizer
from tests.distill_cases import VOCAB, make_examples, make_model, make_teacher, make_trace, with_choices, write
from tests.tiny import tiny_tokenizer

EXAMPLES = with_choices(make_examples(7, homes=3))
ALL = (("sequence", 1.0), ("labels", 0.5), ("logits", 2.0))


def log_p(model, example, vocab_size=None, temperature=1.0):
    """log softmax of what predicts each own token but the first, by the plain logits of the whole sequence."""
    first = len(example.prefix)
    return (model.logits(example.prefix + example.ids)[first:-1, :vocab_size] / temperature).log_softmax(-1)


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def definition(way, student, teacher, objective, example):
    """The sum that a way makes of one example."""
    size, t = objective.vocab_size, objective.temperature
    learnt = [at for at, supervised in enumerate(example.mask) if supervised]
    q = log_p(student, example, size)
    if way == "sequence":
        return -sum(q[at - 1, example.ids[at]] for at in learnt)
    if way == "labels":
        pairs = [(q[c.at - 1, list(c.ids)], torch.tensor(c.probabilities, dtype=torch.float64).log()) for c in example.choices]
        return sum(kl(p, q_there) for q_there, p in pairs)
    if way == "on-policy":
        p = log_p(teacher, example, size)
        return sum(kl(q[at - 1], p[at - 1]) for at in learnt)
    q, p = log_p(student, example, size, t), log_p(teacher, example, size, t)
    values = []
    for at in learnt:
        a, b = p[at - 1], q[at - 1]
        middle = (objective.beta * a.exp() + (1 - objective.beta) * b.exp()).log()
        jsd = objective.beta * kl(a, middle) + (1 - objective.beta) * kl(b, middle)
        values.append({"forward_kl": kl(a, b), "reverse_kl": kl(b, a), "jsd": jsd}[objective.divergence])
    return sum(values) * t**2


def gradients(parameters):
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def assert_same(found, expected, rtol=1e-9):
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize(
    ("way", "settings"),
    [("sequence", {}), ("labels", {}), ("on-policy", {"temperature": 2.0})]
    + [("logits", {"divergence": kind, "beta": 0.3, "temperature": t}) for kind, t in (("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 1.5))],
)
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_a_pack_equals_the_definition_on_each_example_alone(way, settings, vocab_size):
    """The teacher's head is padded further than the student's, and both are cut to the real vocabulary."""
    student, parameters = make_model()
    teacher = make_teacher(vocab_size=VOCAB if vocab_size is None else VOCAB + 16)
    small = [replace(e, ids=[i % 40 for i in e.ids], prefix=[i % 40 for i in e.prefix]) for e in make_examples(7, homes=3)]
    examples = [replace(e, choices=(Choice(2, (3, 5), (0.25, 0.75)), Choice(3, (7,), (1.0,)))) for e in small]
    objective = Objective(teacher=teacher, vocab_size=vocab_size, **settings)
    expected = sum(definition(way, student, teacher, objective, example) for example in examples)
    expected.backward()
    wanted = gradients(parameters)
    found = pack_losses(student, collate(examples), objective, [way])[way]
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same(gradients(parameters), wanted)
    for other in ("sequence", "labels", "logits", "on-policy"):
        if other != way:
            assert definition(other, student, teacher, objective, examples[0]).item() != pytest.approx(
                definition(way, student, teacher, objective, examples[0]).item(), rel=1e-3
            )


def test_zero_where_the_student_is_its_teacher():
    student, parameters = make_model()
    teacher = copy.deepcopy(student).requires_grad_(False)
    own = [replace(e, choices=tuple(Choice(t, tuple(range(VOCAB)), tuple(log_p(teacher, e)[t - 1].exp().tolist())) for t in (2, 3))) for e in EXAMPLES]
    for way in ("labels", "logits", "on-policy"):
        for kind in ("forward_kl", "reverse_kl", "jsd"):
            value = pack_losses(student, collate(own), Objective(teacher=teacher, divergence=kind), [way])[way]
            value.backward()
            assert abs(value.item()) < 1e-11
            assert all(gradient.norm() < 1e-11 for gradient in gradients(parameters).values())


def test_ways_are_weighted_means_however_the_examples_are_divided():
    """Ways have counts of their own: 12 choices are not 27 tokens, and some examples have no choice."""
    student, parameters = make_model()
    teacher = make_teacher()
    examples = [replace(e, choices=()) if i % 3 == 0 else e for i, e in enumerate(EXAMPLES)]
    objective = Objective(ALL, teacher=teacher, divergence="jsd", temperature=2.0)
    counts = {"labels": sum(len(e.choices) for e in examples), "sequence": sum(sum(e.mask) for e in examples)}
    counts["logits"] = counts["sequence"]
    sums = {way: sum(definition(way, student, teacher, objective, e) for e in examples) for way, _ in ALL}
    expected = sum(weight * sums[way] / counts[way] for way, weight in ALL)
    expected.backward()
    wanted = gradients(parameters)
    assert counts["labels"] != counts["sequence"]
    for packs in ([examples], [[e] for e in examples], [examples[4:], examples[:4]]):
        step = accumulate(student, packs, objective)
        assert step.loss == pytest.approx(expected.item(), rel=1e-9)
        assert dict(step.ways) == pytest.approx({way: (sums[way] / counts[way]).item() for way, _ in ALL}, rel=1e-9)
        assert_same(gradients(parameters), wanted)
    assert validation_loss(student, examples, 60, objective) == pytest.approx(expected.item(), rel=1e-9)


def test_the_whole_vocabulary_in_float32():
    """V = 151,936 of which 151,669 are real: every way's value and gradients, against float64."""
    size = {"vocab_size": 151_936}
    student, parameters = make_model(torch.float32, **size)
    exact, exact_parameters = make_model(torch.float64, **size)
    teacher = make_teacher(torch.float32, **size)
    examples = with_choices(make_examples(2, homes=1))
    examples = [replace(e, ids=[i * 3_000 for i in e.ids], choices=tuple(replace(c, ids=tuple(i * 3_000 for i in c.ids)) for c in e.choices)) for e in examples]
    with torch.no_grad():
        for name, parameter in exact_parameters.items():
            parameter.copy_(parameters[name])
        for mine, theirs in zip(exact.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)
    for way in ("sequence", "labels", "logits", "on-policy"):
        objective = Objective(teacher=teacher, divergence="jsd", vocab_size=151_669)
        value = pack_losses(student, collate(examples), objective, [way])[way]
        value.backward()
        wide = replace(objective, teacher=copy.deepcopy(teacher).double())
        expected = sum(definition(way, exact, wide.teacher, wide, example) for example in examples)
        expected.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
        assert_same(gradients(parameters), {name: g.float() for name, g in gradients(exact_parameters).items()}, rtol=2e-3)
    own = replace(objective, teacher=copy.deepcopy(student).requires_grad_(False))
    for way in ("logits", "on-policy"):
        assert abs(pack_losses(student, collate(examples), own, [way])[way].item()) < 1e-4


def test_a_pack_without_memory_is_told(tmp_path, monkeypatch):
    model, _ = make_model()
    monkeypatch.setattr(model, "hidden", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(UserError, match=f"no memory for {len(collate(EXAMPLES).ids)} tokens: lower --batch-tokens or give --checkpoint-activations"):
        accumulate(model, [EXAMPLES])
    with pytest.raises(UserError, match=r"no memory for \d+ tokens: lower --batch-tokens$"):
        with_top_k(EXAMPLES, tmp_path / "teacher.safetensors", 5, 60, 2.0, VOCAB, lambda: model)


SETTINGS = LoopSettings(lr=3e-2, epochs=12, batch_tokens=200)


@pytest.mark.parametrize("k", [VOCAB, 5])
def test_a_teacher_that_was_stored(tmp_path, k):
    """With every token stored it is the live teacher; with a few, the bucket's definition; and it is asked once."""
    student, parameters = make_model()
    teacher, asked = make_teacher(), []
    objective = Objective((("logits", 1.0),), divergence="jsd", temperature=2.0, teacher=teacher)

    def load():
        asked.append(1)
        return teacher

    stored = [with_top_k(EXAMPLES, tmp_path / "teacher.safetensors", k, 60, 2.0, VOCAB, load) for _ in range(2)][1]
    assert len(asked) == 1 and [replace(e, top=None) for e in stored] == EXAMPLES
    (tmp_path / "teacher.safetensors").unlink()
    (tmp_path / "teacher.safetensors").write_bytes(b"x" * 99)  # damaged: it is asked anew
    assert torch.equal(with_top_k(EXAMPLES, tmp_path / "teacher.safetensors", k, 60, 2.0, VOCAB, load)[0].top[1], stored[0].top[1])
    other = with_top_k(EXAMPLES[1:], tmp_path / "teacher.safetensors", k, 60, 2.0, VOCAB, load)  # of other examples it is asked anew
    assert len(asked) == 3 and torch.equal(other[0].top[0], stored[1].top[0])
    if k == VOCAB:
        expected = sum(definition("logits", student, teacher, objective, example) for example in EXAMPLES)
    else:
        expected = torch.zeros((), dtype=torch.float64)
        for example in EXAMPLES:
            p, q = log_p(teacher, example, None, 2.0), log_p(student, example, None, 2.0)
            for at in (at for at, learnt in enumerate(example.mask) if learnt):
                top = p[at - 1].topk(k)
                a, b = (torch.cat([x, (1 - x.exp().sum())[None].log()]) for x in (top.values, q[at - 1, top.indices]))
                middle = (0.5 * a.exp() + 0.5 * b.exp()).log()
                expected = expected + 4 * (0.5 * kl(a, middle) + 0.5 * kl(b, middle))
    expected.backward()
    wanted = gradients(parameters)
    step = accumulate(student, [stored[3:], stored[:3]], replace(objective, teacher=None))
    assert step.loss * step.supervised == pytest.approx(expected.item(), rel=1e-5)
    assert_same({name: g * step.supervised for name, g in gradients(parameters).items()}, wanted, rtol=1e-4)  # logprobs are in float32


@pytest.mark.parametrize("ways", [(("sequence", 1.0),), (("labels", 1.0),), (("logits", 1.0),), ALL])
def test_each_way_lowers_its_loss(tmp_path, ways):
    model, parameters = make_model(torch.float32)
    objective = Objective(ways, teacher=make_teacher(torch.float32))
    before = validation_loss(model, EXAMPLES, 200, objective)
    train(model, parameters, EXAMPLES, [], SETTINGS, tmp_path, objective=objective)
    assert validation_loss(model, EXAMPLES, 200, objective) < 0.7 * before


def test_on_policy_brings_the_student_nearer_to_its_teacher_on_its_own_text(tmp_path):
    model, parameters = make_model(torch.float32)
    objective = Objective(on_policy_fraction=1.0, teacher=make_teacher(torch.float32))

    def divergence():
        return accumulate(model, [write(model, EXAMPLES * 2, 77)], objective, on_policy=True, gradients=False).loss

    before, seeds = divergence(), []

    def rollout(examples, seed):
        seeds.append(seed)
        return write(model, examples, seed)

    train(model, parameters, EXAMPLES, [], replace(SETTINGS, epochs=30), tmp_path, objective=objective, rollout=rollout)
    assert divergence() < 0.7 * before
    assert len(set(seeds)) == len(seeds) == 30 * math.ceil(sum(len(e.ids) for e in EXAMPLES) / 200)


def test_steps_on_policy_are_the_asked_for_share_evenly_and_seeded():
    for share in (0.0, 0.25, 1 / 3, 0.5, 1.0):
        drawn = [[Objective(on_policy_fraction=share).is_on_policy(step, seed) for step in range(60)] for seed in range(8)]
        assert all(abs(sum(steps) - 60 * share) <= 1 for steps in drawn)
        assert len({tuple(steps) for steps in drawn}) > 1 or share in (0.0, 1.0)
        assert drawn[3] == [Objective(on_policy_fraction=share).is_on_policy(step, 3) for step in range(60)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"ways": ()}, "not none"), ({"ways": (("truth", 1.0),)}, "sequence, labels, logits"), ({"ways": (("labels", 0.0),)}, "weight above 0"),
     ({"ways": (("labels", 1.0),) * 2}, "each once"), ({"divergence": "kl"}, "one of forward_kl"), ({"beta": 2.0}, "beta 0 to 1"),
     ({"temperature": 0.0}, "temperature above 0"), ({"on_policy_fraction": 1.5}, "between 0 and 1")],
)  # fmt: skip
def test_mistakes_are_named(wrong, words):
    with pytest.raises(UserError, match=words):
        Objective(**wrong)


# choices from traces

LABELS = ["WATCHING_TV", "WASHING", "WATCHING_FILM", "EATING", "EAT", "COOKING"]
P = {"WATCHING_TV": 0.4, "WASHING": 0.1, "WATCHING_FILM": 0.05, "EATING": 0.25, "EAT": 0.05, "COOKING": 0.15}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def trace_of(answer, probabilities):
    return make_trace(answer=answer, truth=((),) * len(answer), labels=LABELS, probabilities=probabilities)


@pytest.mark.parametrize("train_on", ["reasoning", "answer"])
def test_choices_follow_the_tokens_of_the_labels(tokenizer, train_on):
    answer = ("WATCHING_TV", "EAT", "EATING", "COOKING")
    (example,) = examples_from_traces([trace_of(answer, [P] * 4)], tokenizer, train_on)
    spelt = [[tokenizer.encode(canonical([*answer[:n], label, *answer[n + 1 :]])) for label in LABELS] for n in range(4)]
    end = len(example.ids) - 1
    own = tokenizer.encode(canonical(answer))
    assert example.ids[end - len(own) : end] == own
    assert len({choice.at for choice in example.choices}) == len(example.choices) > 4  # labels of several tokens branch several times
    for choice in example.choices:
        at = choice.at - (end - len(own))
        assert example.mask[choice.at] and example.ids[choice.at] in choice.ids and sum(choice.probabilities) == pytest.approx(1)
        (n,) = [n for n in range(4) if len({tuple(ids[at : at + 1]) for ids in spelt[n] if ids[:at] == own[:at]}) > 1]
        alive = {label: ids for label, ids in zip(LABELS, spelt[n], strict=True) if ids[:at] == own[:at]}
        for token, p in zip(choice.ids, choice.probabilities, strict=True):
            behind = sum(P[label] for label, ids in alive.items() if ids[at] == token)
            assert p == pytest.approx(behind / sum(P[label] for label in alive))
    # along the label that was answered the conditionals multiply to its own probability
    product = math.prod(choice.probabilities[choice.ids.index(example.ids[choice.at])] for choice in example.choices)
    assert product == pytest.approx(math.prod(P[label] for label in answer))


def test_only_guided_events_have_choices_and_labels_not_named_share_the_rest(tokenizer):
    answer = ("COOKING", "EATING")
    plain, none, one = examples_from_traces([trace_of(answer, None), trace_of(answer, [None, {}]), trace_of(answer, [None, {"EATING": 0.5}])], tokenizer, "answer")
    assert plain == none and plain.choices == () and replace(one, choices=()) == plain
    full = {label: 0.5 if label == "EATING" else 0.1 for label in LABELS}
    (expected,) = examples_from_traces([trace_of(answer, [None, full])], tokenizer, "answer")
    for found, wanted in zip(one.choices, expected.choices, strict=True):
        assert (found.at, found.ids) == (wanted.at, wanted.ids) and found.probabilities == pytest.approx(wanted.probabilities)
    (certain,) = examples_from_traces([trace_of(answer, [{"COOKING": 1.0}, None])], tokenizer, "answer")
    assert [choice.probabilities for choice in certain.choices] == [(1.0,)] * len(certain.choices) != []
