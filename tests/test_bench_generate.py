"""tools.bench_generate runs, and both sides of it do the same work."""

import json
from importlib.util import find_spec

from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request, Sampling
from tests.door_cases import data, model, short_prompts  # noqa: F401
from tests.tiny import transformers_model
from tools.bench_generate import main, theirs


def test_a_run(model, data, capsys):
    assert main([model, "--data", data, "--windows", "3", "--batch", "2", "--new", "2", "--dtype", "float32"]) == 0
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"]
    others = 3 * all(map(find_spec, ("llama_cpp", "gguf")))
    assert len(ratios) == 6 + others and {"prefill_to_limit", "decode2_to_limit", "guided_to_transformers_prefix"} <= ratios.keys() and all(ratio > 0 for ratio in ratios.values())


def greedy(model):
    """Ids of a prefix, of three prompts behind it, and of the six tokens that harkd writes behind each."""
    tokenizer = load_tokenizer(model)
    tokenizer.stop_ids = ()
    texts, prefix = ["fridge opened", "stove", "a chair is occupied"], "<|im_start|>system\nYou name activities.<|im_end|>\n<|im_start|>"
    asked = [Request(text, f"user\n{text}<|im_end|>\n", prefix, sampling=Sampling(temperature=0, max_new_tokens=6)) for text in texts]
    ours = load_model(model, "cpu", "float32")
    tokenizer.vocab_size = ours.config.vocab_size  # others do not know which rows of the head are padding
    written = {done.request.window: done.ids for done in Generator(ours, tokenizer).generate(asked)}
    return tokenizer.encode(prefix), [tokenizer.encode(one.prompt) for one in asked], [written[text] for text in texts]


def test_transformers_writes_the_same_with_and_without_the_shared_prefix(model):
    prefix, owns, expected = greedy(model)
    other = transformers_model(model)
    for written in (theirs(other, [prefix + own for own in owns], [], 6, 2), theirs(other, owns, prefix, 6, 2)):
        assert written == expected
