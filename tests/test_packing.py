"""Packs are exact: whatever is packed with whatever, loss and gradients are those of each example on its own."""

from dataclasses import replace

import pytest
import torch

from harkd.distill.losses import Objective, accumulate, pack_losses, validation_loss
from harkd.distill.packing import collate, plan
from harkd.errors import UserError
from tests.distill_cases import VOCAB, make_examples, make_model

EXAMPLES = make_examples(7, homes=3)


def pack_loss(model, batch, vocab_size=None):
    return pack_losses(model, batch, Objective(vocab_size=vocab_size), ["sequence"])["sequence"]


def alone(model, example):
    """Sum of -log p of one example by the model's own logits of the whole sequence, without any of packing's code."""
    ids = example.prefix + example.ids
    log_p = model.logits(ids).log_softmax(-1)
    first = len(example.prefix)
    return -sum(log_p[first + t - 1, ids[first + t]] for t, learnt in enumerate(example.mask) if learnt)


def gradients(parameters):
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def assert_same(found, expected, rtol=1e-10):
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("lora", [True, False])
def test_a_pack_equals_each_example_on_its_own_behind_its_own_prefix(lora):
    model, parameters = make_model(lora=lora)
    expected = sum(alone(model, example) for example in EXAMPLES)
    expected.backward()
    expected_gradients = gradients(parameters)
    packed = pack_loss(model, collate(EXAMPLES))
    packed.backward()
    assert packed.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same(gradients(parameters), expected_gradients)


def test_the_comparison_can_fail():
    """A pack whose examples see another example, or the wrong positions, is told apart by the tolerance used above."""
    model, _ = make_model()
    batch = collate(EXAMPLES[:4])
    right = pack_loss(model, batch).item()
    joined = type(batch.sequences).packed([len(batch.ids)])
    for wrong in ({"sequences": joined}, {"positions": torch.arange(len(batch.ids))}, {"rows": batch.rows + 1}):
        assert pack_loss(model, replace(batch, **wrong)).item() != pytest.approx(right, rel=1e-4)


def test_the_arrangement_in_packs_does_not_change_a_step():
    model, parameters = make_model()
    step = accumulate(model, [EXAMPLES])
    loss, supervised = step.loss, step.supervised
    expected = gradients(parameters)
    assert supervised == sum(sum(example.mask) for example in EXAMPLES)
    for packs in ([[example] for example in EXAMPLES], [EXAMPLES[4:], EXAMPLES[:4]], [EXAMPLES[::-1]]):
        other = accumulate(model, packs)
        assert (other.loss, other.supervised) == (pytest.approx(loss, rel=1e-10), supervised)
        assert_same(gradients(parameters), expected)
    assert loss == pytest.approx((sum(alone(model, example) for example in EXAMPLES) / supervised).item(), rel=1e-10)
    for batch_tokens in (20, 60, 1000):
        assert validation_loss(model, EXAMPLES, batch_tokens) == pytest.approx(loss, rel=1e-10)


def test_examples_without_a_prefix():
    model, _ = make_model()
    examples = [replace(example, prefix=[]) for example in EXAMPLES[:3]]
    assert pack_loss(model, collate(examples)).item() == pytest.approx(sum(alone(model, e) for e in examples).item(), rel=1e-10)


def test_the_prefix_is_there_once_and_positions_restart_behind_it():
    a, b = make_examples(1, homes=1)[0], make_examples(2, homes=2, seed=1)[1]
    batch = collate([a, b, a])
    p, q = len(a.prefix), len(b.prefix)
    assert batch.ids.tolist() == a.prefix + a.ids + a.ids + b.prefix + b.ids
    n = len(a.ids)
    expected = [*range(p), *range(p, p + n), *range(p, p + n), *range(q + len(b.ids))]
    assert batch.positions.tolist() == expected
    assert batch.sequences.prefix_of.tolist() == [-1, 0, 0, -1, 1]
    assert batch.sequences.prefix_start.tolist() == [0, p + 2 * n] and batch.sequences.prefix_len.tolist() == [p, q]


def test_row_t_predicts_token_t_plus_1():
    (example,) = make_examples(1, homes=1)
    batch = collate([example])
    p = len(example.prefix)
    expected = [(p + t - 1, example.ids[t]) for t in range(len(example.ids)) if example.mask[t]]
    assert list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)) == expected


def with_token(example, t):
    """The example with token t replaced by another."""
    return replace(example, ids=[(token + 1) % VOCAB if i == t else token for i, token in enumerate(example.ids)])


def test_a_token_that_only_unsupervised_ones_follow_does_not_change_the_loss():
    model, _ = make_model()
    example = replace(EXAMPLES[0], ids=[3, 4, 5, 6, 7, 8], mask=[False, False, True, True, False, False])
    loss = pack_loss(model, collate([example, EXAMPLES[1]])).item()
    for t in range(6):  # tokens 4 and 5 stand behind the last supervised one; token 0 to 3 are seen or predicted
        changed = pack_loss(model, collate([with_token(example, t), EXAMPLES[1]])).item()
        assert (changed == pytest.approx(loss, rel=1e-12)) == (t >= 4), t


def test_a_masked_span_is_seen_but_not_learnt():
    """Masking a token takes exactly its own term out of the loss."""
    model, _ = make_model()
    example = replace(EXAMPLES[0], ids=[3, 4, 5, 6, 7, 8], mask=[False, False, True, True, True, True])
    masked = replace(example, mask=[False, False, True, False, True, True])
    term = replace(example, mask=[False, False, False, True, False, False])
    whole, rest, one = (pack_loss(model, collate([e])).item() for e in (example, masked, term))
    assert rest + one == pytest.approx(whole, rel=1e-12) and one > 0


@pytest.mark.parametrize("mask", [[False] * 6, [True] * 6])
def test_an_example_with_nothing_to_learn_or_its_first_token_supervised_raises(mask):
    with pytest.raises(ValueError, match="supervised"):
        collate([EXAMPLES[1], replace(EXAMPLES[0], ids=[3, 4, 5, 6, 7, 8], mask=mask)])


def test_padded_ids_of_the_head_get_no_probability():
    model, _ = make_model()
    examples = [replace(e, prefix=[i % 40 for i in e.prefix], ids=[i % 40 for i in e.ids]) for e in EXAMPLES]
    batch = collate(examples)
    logits = model.head(model.hidden(batch.ids, batch.positions, batch.sequences)[batch.rows])
    expected = -logits[:, :40].log_softmax(-1).gather(1, batch.targets[:, None]).sum().item()
    assert pack_loss(model, batch, vocab_size=40).item() == pytest.approx(expected, rel=1e-10)
    assert pack_loss(model, batch).item() > expected + 1e-3


@pytest.mark.parametrize(
    ("count", "homes", "batch_tokens"), [(1, 1, 40), (50, 1, 40), (50, 3, 40), (50, 20, 60), (7, 3, 10_000), (0, 1, 40)]
)
def test_a_plan_has_every_example_once_and_keeps_to_its_limit(count, homes, batch_tokens):
    examples = make_examples(count, homes)
    packs = plan(examples, batch_tokens, seed=0, epoch=0)
    assert sorted(i for pack in packs for i in pack) == list(range(count))
    sizes = [len(collate([examples[i] for i in pack]).ids) for pack in packs]
    assert all(0 < size <= batch_tokens for size in sizes)
    longest = max((len(e.prefix) + len(e.ids) for e in examples), default=0)
    assert sum(size < batch_tokens - longest for size in sizes) <= 1  # all but the last are as good as full


def test_a_plan_is_a_function_of_seed_and_epoch():
    examples = make_examples(30, homes=2)
    first = plan(examples, 60, seed=1, epoch=2)
    assert first == plan(examples, 60, seed=1, epoch=2)
    assert first not in [plan(examples, 60, 1, 3), plan(examples, 60, 2, 2)]
    assert plan(examples, 60, 1, 23) != plan(examples, 60, 12, 3)


def test_homes_take_turns():
    examples = make_examples(200, homes=2)
    homes = [{i % 2 for i in pack} for pack in plan(examples, 60, seed=0, epoch=0)]
    turns = sum(before != after for before, after in zip(homes, homes[1:], strict=False))
    assert turns > len(homes) / 4


def test_an_example_that_is_too_long_is_named():
    examples = make_examples(3)
    size = len(examples[2].prefix) + 30
    examples[2] = replace(examples[2], ids=[1] * 30, mask=[False] + [True] * 29)
    assert plan(examples, size, 0, 0)
    with pytest.raises(UserError, match=f"home0/r/0002 has {size} tokens: raise --batch-tokens"):
        plan(examples, size - 1, 0, 0)


@pytest.mark.parametrize("lora", [True, False])
def test_layers_that_are_computed_twice_give_the_same_bits_and_keep_less(lora):
    model, parameters = make_model(torch.float32, lora=lora, num_hidden_layers=6)
    found = {}
    for again in (False, True):
        model.checkpoint_activations, kept = again, {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = pack_loss(model, collate(EXAMPLES))
        loss.backward()
        found[again] = loss.item(), gradients(parameters), sum(kept.values()) - sum(p.nbytes for p in model.parameters())
    assert found[True][0] == found[False][0]
    assert all(torch.equal(found[True][1][name], gradient) for name, gradient in found[False][1].items())
    assert found[True][2] < 0.5 * found[False][2]
