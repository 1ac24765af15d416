"""LoRA against PEFT: the same adapters give the same logits and gradients both ways, and what is not plain LoRA is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from harkd.errors import UserError
from harkd.qwen3.lora import (
    LoraConfig, add_lora, fingerprint, load_adapter, lora_parameters, merge, read_adapter_config, read_notes, save_adapter,
)  # fmt: skip
from harkd.qwen3.model import initialise
from harkd.qwen3.weights import load_model, save_model
from tests.tiny import random_model, tiny_model, transformers_model

IDS = torch.randint(384, (21,), generator=torch.Generator().manual_seed(0))
CONFIGS = [
    LoraConfig(),
    LoraConfig(r=1, alpha=3, target_modules=("q_proj",)),
    LoraConfig(r=8, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"), rslora=True),
    LoraConfig(r=5, alpha=2.5, target_modules=("gate_proj", "up_proj", "k_proj", "o_proj")),
]


def randomise(parameters, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(config: LoraConfig, **changes):
    """A tiny model with a random adapter of ours."""
    model = random_model(4, **changes)
    randomise(add_lora(model, config).values())
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(IDS) if hasattr(model, "logits") else model(input_ids=IDS[None]).logits[0]


def equal(left, right, tolerance=1e-5) -> bool:
    return bool((left - right).abs().max() < tolerance * right.abs().max())


def write(folder, model, config, name="base", **notes) -> None:
    save_adapter(folder, lora_parameters(model), config, name, notes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_reads_ours(tmp_path, config, tied):
    peft = pytest.importorskip("peft")
    tiny_model(tmp_path / "base", seed=4, tie_word_embeddings=tied)
    ours = adapted(config, tie_word_embeddings=tied)
    write(tmp_path / "adapter", ours, config, str(tmp_path / "base"), base_fingerprint="0")
    theirs = peft.PeftModel.from_pretrained(transformers_model(tmp_path / "base"), tmp_path / "adapter")
    truth = logits(theirs)
    assert equal(logits(ours), truth)
    assert not equal(logits(random_model(4, tie_word_embeddings=tied)), truth, 1e-3)
    if not config.rslora:
        assert not equal(logits(adapted(replace(config, alpha=config.alpha * 1.1), tie_word_embeddings=tied)), truth, 1e-4)
    saved = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (saved.r, saved.lora_alpha, set(saved.target_modules)) == (config.r, config.alpha, set(config.target_modules))


@pytest.mark.parametrize("config", CONFIGS)
def test_ours_reads_pefts_and_gradients_agree(tmp_path, config):
    peft = pytest.importorskip("peft")
    tiny_model(tmp_path / "base", seed=4)
    fields = {"r": config.r, "lora_alpha": config.alpha, "target_modules": list(config.target_modules), "use_rslora": config.rslora}
    theirs = peft.get_peft_model(transformers_model(tmp_path / "base"), peft.LoraConfig(**fields, lora_dropout=0.0, task_type="CAUSAL_LM"))
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    randomise(trained.values())
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base", device="cpu", adapter=tmp_path / "adapter")
    parameters = lora_parameters(ours)
    assert parameters.keys() == trained.keys() and equal(logits(ours), logits(theirs))
    torch.nn.functional.cross_entropy(ours.logits(IDS)[:-1], IDS[1:]).backward()
    torch.nn.functional.cross_entropy(theirs(input_ids=IDS[None]).logits[0, :-1], IDS[1:]).backward()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, trained[name])
        assert trained[name].grad.abs().max() > 0 and equal(parameter.grad, trained[name].grad, 1e-4)
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


def test_a_fresh_adapter_changes_nothing():
    model, truth = random_model(4), logits(random_model(4))
    parameters = add_lora(model, LoraConfig(r=4), seed=3)
    assert torch.equal(logits(model), truth)
    again, other = (add_lora(random_model(4), LoraConfig(r=4), seed=seed) for seed in (3, 4))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(parameters[name], again[name]) and not torch.equal(parameters[name], other[name])
    a = torch.cat([p.flatten() for key, p in parameters.items() if "lora_A" in key and "down_proj" not in key and "o_proj" not in key])
    assert 0.95 * 32**-0.5 < a.abs().max() <= 32**-0.5 and abs(a.var() * 3 * 32 - 1) < 0.2, "uniform in +-1/sqrt(in)"
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    with pytest.raises(UserError, match="adapter already"):
        add_lora(model, LoraConfig())


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_equals_unmerged(config):
    model = adapted(config)
    truth = logits(model)
    names = dict(random_model(4).named_parameters()).keys()
    assert equal(logits(merge(model)), truth) and dict(model.named_parameters()).keys() == names
    assert not lora_parameters(model) and not equal(logits(random_model(4)), truth, 1e-3)


def test_half_precision_is_merged_in_float32():
    config = LoraConfig(r=8, alpha=4)
    model = adapted(config, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in lora_parameters(model).values())
    layer = model.model.layers[0].mlp.up_proj
    a, b, weight = (x.detach().clone().double() for x in (layer.lora_A, layer.lora_B, layer.weight))
    exact = weight + 0.5 * b @ a
    merged = merge(model).model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())
    rounded = (0.5 * (b.bfloat16() @ a.bfloat16())) + weight.bfloat16()
    assert not torch.equal(merged, rounded), "a merge in bfloat16 would show"


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_merged_folder(tmp_path, tied):
    pytest.importorskip("transformers")
    tiny_model(tmp_path / "base", seed=4, tie_word_embeddings=tied)
    model = adapted(CONFIGS[0], tie_word_embeddings=tied)
    truth = logits(model)
    save_model(merge(model), tmp_path / "merged", tmp_path / "base")
    theirs = transformers_model(tmp_path / "merged")
    assert equal(logits(theirs), truth) and equal(logits(load_model(tmp_path / "merged", "cpu")), truth)
    embedding, head = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) != tied
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_the_files_are_those_of_peft_and_vllm(tmp_path):
    config = LoraConfig(r=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    write(tmp_path, adapted(config), config, "Qwen/Qwen3-0.6B", template="1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "harkd.json"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    paths = {"self_attn.q_proj": (32, 64), "mlp.down_proj": (48, 32)}
    expected = {}
    for layer in (0, 1):
        for path, (inputs, outputs) in paths.items():
            expected[f"base_model.model.model.layers.{layer}.{path}.lora_A.weight"] = (4, inputs)
            expected[f"base_model.model.model.layers.{layer}.{path}.lora_B.weight"] = (outputs, 4)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["r"] == 4 and type(fields["lora_alpha"]) is int and fields["lora_alpha"] == 8
    assert set(fields["target_modules"]) == {"q_proj", "down_proj"}
    assert (fields["peft_type"], fields["task_type"], fields["bias"], fields["modules_to_save"]) == ("LORA", "CAUSAL_LM", "none", None)
    assert fields["base_model_name_or_path"] == "Qwen/Qwen3-0.6B" and read_notes(tmp_path) == {"template": "1"}
    assert read_adapter_config(tmp_path) == replace(config, target_modules=("down_proj", "q_proj"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", True), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
        ("bias", "all"), ("bias", "lora_only"),
        ("lora_bias", True), ("fan_in_fan_out", True), ("layers_to_transform", [0]), ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["weight"]), ("exclude_modules", ["q_proj"]), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"), ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]), ("something_new", 3), ("peft_type", "IA3"), ("target_modules", "all-linear"),
        ("target_modules", None),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, field, value):
    config = LoraConfig(r=4)
    write(tmp_path, adapted(config), config)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, field: value}))
    with pytest.raises(UserError) as caught:
        load_adapter(random_model(4), tmp_path)
    assert str(path) in str(caught.value) and field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"peft_type": "LORA", "r": "x", "lora_alpha": 1, "target_modules": ["q_proj"]}'])
def test_damaged_adapter_config(tmp_path, text):
    with pytest.raises(UserError, match="no adapter_config.json"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json cannot be read"):
        read_adapter_config(tmp_path)


def test_an_impossible_adapter_config_is_told_by_its_file(tmp_path):
    write(tmp_path, adapted(LoraConfig(r=4)), LoraConfig(r=4))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 0}))
    with pytest.raises(UserError, match="adapter_config.json: LoRA's rank must be at least 1"):
        read_adapter_config(tmp_path)
    with pytest.raises(UserError, match="no memory for an adapter of rank"):
        add_lora(random_model(4), LoraConfig(r=1 << 40))


@pytest.mark.parametrize("changes", [{"target_modules": ("lm_head",)}, {"target_modules": ()}, {"target_modules": ("q_proj", 5)}, {"r": 0}])
def test_impossible_settings(changes):
    with pytest.raises(UserError):
        LoraConfig(**changes)


def test_an_adapter_of_another_base(tmp_path):
    config = LoraConfig(r=4)
    write(tmp_path, adapted(config), config, "the first", base="the first", base_fingerprint=fingerprint(random_model(4)))
    assert load_adapter(random_model(4), tmp_path).r == 4
    with pytest.raises(UserError, match="another base model.*the first"):
        load_adapter(random_model(5), tmp_path)
    (tmp_path / "harkd.json").unlink()
    assert load_adapter(random_model(5), tmp_path).r == 4, "nothing is known of its weights"
    assert read_notes(tmp_path) == {"base": "the first"}
    for changes in ({"hidden_size": 40}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        model = random_model(4, **changes)
        model.model.norm.requires_grad_(False)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with pytest.raises(UserError, match="does not fit this base model"):
            load_adapter(model, tmp_path)
        assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}, "left as it was"
    (tmp_path / "harkd.json").write_text("[]")
    with pytest.raises(UserError, match="harkd.json"):
        load_adapter(random_model(4), tmp_path)


def test_the_fingerprint(tmp_path):
    """It survives every dtype, an adapter and a way through the disk, and tells other weights and other shapes apart."""
    model = initialise(random_model(4), 4, std=0.02)  # many weights that float16 cannot hold exactly
    value = fingerprint(model)
    assert len(value) == 16 and value == fingerprint(initialise(random_model(4), 4, std=0.02))
    save_model(model, tmp_path)
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        assert fingerprint(load_model(tmp_path, "cpu", dtype)) == value
    add_lora(model, LoraConfig(r=2))
    assert fingerprint(model) == value
    others = [random_model(5), random_model(4, num_hidden_layers=3), random_model(4, rope_theta=1e4)]
    merged = load_model(tmp_path, "cpu")
    randomise(add_lora(merged, LoraConfig(r=2)).values())
    assert len({value, *map(fingerprint, [*others, merge(merged)])}) == 5


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "truncated", "no file"])
def test_damaged_adapter_weights(tmp_path, damage):
    config = LoraConfig(r=4)
    write(tmp_path, adapted(config), config)
    path = tmp_path / "adapter_model.safetensors"
    tensors, name = load_file(path), "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name = "base_model.model.lm_head.lora_B.weight"
        tensors[name] = torch.zeros(2)
    elif damage == "shape":
        tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "no file":
        path.unlink()
    with pytest.raises(UserError) as caught:
        load_adapter(random_model(4), tmp_path)
    said = str(caught.value)
    assert str(tmp_path) in said and (name in said or path.name in said) and "\n" not in said
