"""Mixtures of experts: logits against transformers, files, and generation."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3MoeConfig as TheirConfig
from transformers import Qwen3MoeForCausalLM

from harkd.errors import UserError
from harkd.qwen3.config import Qwen3MoeConfig, check_config, read_config
from harkd.qwen3.lora import LoraConfig, add_lora, fingerprint
from harkd.qwen3.mlp import MLP, Experts
from harkd.qwen3.model import Qwen3, initialise
from harkd.qwen3.weights import load_model, model_size, save_model
from harkd.sampling.generator import Generator
from tests.generator_cases import WARM, all_pages_are_back, mixed_requests, tiny  # noqa: F401
from tests.tiny import tiny_config

SIZES = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)


def config(**changes) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**{**vars(tiny_config()), **SIZES, **changes})


def random(seed=0, dtype=torch.float32, **changes) -> Qwen3:
    return initialise(Qwen3(config(**changes)), seed, std=0.3).to(dtype).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": False, "num_experts_per_tok": 3}, {"num_experts_per_tok": 1}, {"num_experts": 8, "num_experts_per_tok": 8, "tie_word_embeddings": True}], ids=str
)
def test_logits_are_those_of_transformers_from_its_files_and_from_ours(tmp_path, changes):
    theirs = Qwen3MoeForCausalLM(TheirConfig(**{**config(**changes).to_dict(), "num_hidden_layers": 2}, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())), alpha=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", "cpu", "float32")
    assert model_size(tmp_path / "theirs")["parameters"] == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert ours.config == replace(config(**changes), dtype="float32") and isinstance(ours.model.layers[1].mlp, Experts)
    save_model(ours, tmp_path / "ours")
    back = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(load_model(tmp_path / "ours", "cpu").logits(torch.arange(9)), ours.logits(torch.arange(9)))
    ids = torch.randint(0, 384, (70,), generator=torch.Generator().manual_seed(1))
    for other in (theirs, back):
        with torch.no_grad():
            expected = other(ids[None]).logits[0]
        assert expected.std() > 0.5
        torch.testing.assert_close(ours.logits(ids).detach(), expected, atol=2e-4, rtol=1e-4)


def test_every_token_by_itself_through_its_experts():
    layer = Experts(config(num_experts_per_tok=3, norm_topk_prob=False)).double()
    initialise_ = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4, generator=initialise_)
    x = torch.randn(40, 32, dtype=torch.float64, generator=initialise_)
    p = (x @ layer.gate.weight.T).softmax(-1)
    expected = torch.stack([sum(p[t, e] * layer.experts[e](x[t : t + 1], "auto")[0] for e in p[t].topk(3).indices.tolist()) for t in range(40)])
    torch.testing.assert_close(layer(x, "auto"), expected)
    torch.testing.assert_close(layer(x[7:8], "auto")[0], expected[7])
    assert len({tuple(sorted(p[t].topk(3).indices.tolist())) for t in range(40)}) > 3 and isinstance(layer.experts[0], MLP)


def test_it_generates_in_any_batch(tiny):
    model = random(dtype=torch.float64, vocab_size=tiny.model.config.vocab_size, max_position_embeddings=512)
    requests = [replace(r, sampling=replace(WARM, max_new_tokens=6)) for r in mixed_requests()]
    written = []
    for options in ({"batch": 1}, {"batch": 9, "step_tokens": 20, "page_size": 8}):
        g = Generator(model, tiny.tokenizer, cache_tokens=2048, **options)
        written.append({(c.request.window, c.request.sample): c.ids for c in g.generate(requests)})
        assert all_pages_are_back(g)
    assert written[0] == written[1] and len(written[0]) == len(requests)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 0), ("num_experts_per_tok", 6), ("num_experts_per_tok", None), ("moe_intermediate_size", "x"), ("norm_topk_prob", 1),
        ("decoder_sparse_step", 2), ("mlp_only_layers", [0]), ("shared_expert_intermediate_size", 64),
    ],
)  # fmt: skip
def test_refusals_name_the_field(field, value):
    fields = config().to_dict()
    assert check_config(fields, "here") == config()
    with pytest.raises(UserError, match=f"here: .*{field}"):
        check_config({**fields, field: value}, "here")


def test_its_config_is_read_back_and_it_takes_no_adapter(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()))
    assert read_config(tmp_path) == config()
    with pytest.raises(UserError, match="adapters are for dense models"):
        add_lora(random(), LoraConfig())


def test_it_teaches_a_dense_student_by_its_logits():
    """A run's digest tells one teacher with experts from another."""
    from harkd.distill.losses import Objective, accumulate
    from tests.distill_cases import VOCAB, make_examples, make_model

    student, parameters = make_model()
    objective = Objective((("logits", 1.0),), teacher=random(dtype=torch.float64, vocab_size=VOCAB))
    assert accumulate(student, [make_examples(2)], objective).loss > 0 and all(p.grad.norm() > 0 for p in parameters.values())
    other = replace(objective, teacher=random(seed=1, dtype=torch.float64, vocab_size=VOCAB))
    assert objective.facts() != other.facts() and objective.facts()[:-1] == other.facts()[:-1]
    assert fingerprint(objective.teacher) == fingerprint(random(vocab_size=VOCAB))
