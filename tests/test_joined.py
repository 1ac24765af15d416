"""Maps that share an input as one product: the same results, the same names, and a way back."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from harkd.qwen3.config import PROJECTIONS
from harkd.qwen3.linear import Linear, join, project, separate
from harkd.qwen3.lora import LoraConfig, add_lora, lora_parameters, merge, save_adapter
from harkd.qwen3.weights import load_model, save_model
from harkd.recognition import Machine, load_generator
from harkd.sampling.generator import Generator
from tests.generator_cases import GREEDY, request
from tests.test_lora import equal, randomise
from tests.test_weights import same
from tests.tiny import random_model, tiny_model

IDS = torch.arange(3, 40)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def logits(model):
    with torch.no_grad():
        return model.logits(IDS)


@pytest.fixture(params=["reordered", "plain"])
def order(request, monkeypatch):
    """With oneDNN's order where it is to be had, and without."""
    if request.param == "plain":
        monkeypatch.setattr("harkd.qwen3.linear._reorders", lambda weight: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_logits(order, dtype):
    model, truth = random_model(2, dtype=dtype), logits(random_model(2, dtype=dtype))
    names = {name: p.shape for name, p in model.named_parameters()}
    assert join(model) is model and {name: p.shape for name, p in model.named_parameters()} == names
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.joined is layer.self_attn.v_proj.joined is not layer.mlp.up_proj.joined is layer.mlp.gate_proj.joined
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (logits(model) - truth).abs().max() < tolerance < (logits(random_model(3, dtype=dtype)) - truth).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_back_loses_nothing(order, dtype, tmp_path):
    truth = random_model(2, dtype=dtype)
    assert same(separate(join(random_model(2, dtype=dtype))), truth) and all(p.requires_grad for p in truth.parameters())
    save_model(join(random_model(2, dtype=dtype)), tmp_path)
    assert same(load_model(tmp_path, "cpu"), truth) and not same(load_model(tmp_path, "cpu"), random_model(3, dtype=dtype))


def test_an_adapter_goes_onto_a_joined_model(order):
    def adapted(model):
        parameters = add_lora(model, LoraConfig(r=4, target_modules=("k_proj", "up_proj")))
        with torch.no_grad():
            for i, parameter in enumerate(parameters.values()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        return model

    truth, model = adapted(random_model(2)), adapted(join(random_model(2)))
    assert torch.equal(logits(model), logits(truth)) and not torch.equal(logits(truth), logits(random_model(2)))
    join(model)  # what carries an adapter stays as it is
    assert model.model.layers[0].self_attn.q_proj.joined is None and model.model.layers[0].mlp.down_proj.joined is not None
    assert (logits(model) - logits(truth)).abs().max() < 1e-5
    assert same(merge(separate(model)), merge(truth))


def test_gradients_flow_through_joined_maps(order):
    """Placeholders are never multiplied by, whether gradients are wanted or not."""
    model, truth = join(random_model(2)), random_model(2)
    for one in (model, truth):
        one.logits(IDS).square().mean().backward()
    (left, right), expected = (one.logits(IDS).detach() for one in (model, truth)), logits(truth)
    torch.testing.assert_close((left, right), (expected, expected), atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        want = dict(truth.named_parameters())[name].grad
        assert parameter.grad is None if "proj" in name else equal(parameter.grad, want), name


@pytest.mark.parametrize("modules", [("q_proj", "up_proj", "down_proj"), PROJECTIONS])
def test_a_generator_is_loaded_with_its_adapter_merged(order, modules, tmp_path):
    """It writes what the adapter beside the weights writes, and all its maps are joined, as those of a model without an adapter."""
    base, adapter, config = str(tiny_model(tmp_path / "base", seed=4)), str(tmp_path / "adapter"), LoraConfig(r=4, target_modules=modules)
    parameters = add_lora(random_model(4), config)
    randomise(parameters.values())
    save_adapter(tmp_path / "adapter", parameters, config, base, {})
    asked = [request(text, text, sampling=replace(GREEDY, max_new_tokens=40)) for text in ("fridge opened", "stove on", "bed")]

    def written(generator):
        return {done.request.window: (done.ids, done.logprobs) for done in generator.generate(asked)}

    for dtype, tolerance in (("float64", 1e-11), ("float32", 1e-4)):
        loaded = load_generator(base, adapter, dtype, Machine("cpu", 2, 2048))
        assert not lora_parameters(loaded.model) and all(map.joined for map in loaded.model.model.layers.modules() if type(map) is Linear)
        beside = written(Generator(load_model(base, "cpu", dtype, adapter), loaded.tokenizer, 2, 2048))
        merged, plain = written(loaded), written(load_generator(base, None, dtype, Machine("cpu", 2, 2048)))
        for window, (ids, logprobs) in beside.items():
            assert merged[window][0] == ids != plain[window][0]
            torch.testing.assert_close(merged[window][1], logprobs, atol=tolerance, rtol=0)
    truth, half = logits(load_model(base, "cpu", "float64", adapter)), load_generator(base, adapter, "bfloat16", Machine("cpu", 2, 64)).model
    merged, beside, plain = ((logits(model) - truth).abs().max() for model in (half, load_model(base, "cpu", "bfloat16", adapter), random_model(4)))
    assert merged < 1.5 * beside < plain / 4


def test_weights_are_held_once(order):
    """Views of one buffer, or placeholders: no weight is beside the joined one."""
    model = join(random_model(2))
    attention = model.model.layers[0].self_attn
    joined = attention.q_proj.joined.weight
    assert joined.is_mkldnn == (order == "reordered" and torch.backends.mkldnn.is_available())
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        held = linear.weight.is_meta or linear.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
        assert held and not linear.weight.requires_grad


def test_a_part_of_a_group_is_not_taken_for_all_of_it(monkeypatch):
    monkeypatch.setattr("harkd.qwen3.linear._reorders", lambda weight: False)  # where it is, a part alone has no weight
    maps = [Linear(8, n) for n in (4, 6)]
    for linear in maps:
        torch.nn.init.normal_(linear.weight)
    holder = torch.nn.Module()
    holder.gate_proj, holder.up_proj = maps
    x = torch.randn(5, 8)
    with torch.no_grad():
        truth = project(x, maps)
        join(holder)
        for part in (maps, maps[1:]):
            torch.testing.assert_close(project(x, part), truth[-len(part) :])
    separate(holder)
    assert torch.autograd.grad(project(x, maps)[1].sum(), maps[1].weight)[0].abs().sum() > 0


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("knows", [True, False])
def test_many_rows_of_half_precision_are_as_exact_on_any_processor(joined, knows, order, monkeypatch):
    """And take float32 only where the processor does not multiply half precision: a product of rounded factors is then rounded once."""
    monkeypatch.setattr("harkd.kernels.backend._multiplies", lambda dtype: knows or dtype == torch.float32)
    model = random_model(2, dtype=torch.bfloat16)
    gate, up = model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj
    x = torch.randn(70, gate.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = torch.cat([F.linear(x.double(), linear.weight.double()) for linear in (gate, up)], 1)
    if joined:
        join(model)
    with torch.no_grad():
        out = torch.cat(project(x, [gate, up]), 1)
    assert out.dtype == torch.bfloat16
    error, rounding = (out.double() - truth).abs().max(), (truth.bfloat16().double() - truth).abs().max()
    assert error <= (1.5 if knows else 1.01) * rounding and rounding > 0
