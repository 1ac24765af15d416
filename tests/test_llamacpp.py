"""tools.llamacpp: where llama.cpp is installed, it writes harkd's tokens from the same weights."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from harkd.qwen3.tokenizer import load_tokenizer
from harkd.qwen3.weights import load_model
from harkd.sampling.generator import Generator
from harkd.sampling.request import Request, Sampling
from tests.door_cases import model  # noqa: F401
from tools.llamacpp import LlamaCpp, write_gguf


@pytest.mark.parametrize("unified", [True, False])
def test_llamacpp_writes_the_same(model, tmp_path, unified):
    tokenizer = load_tokenizer(model)
    tokenizer.stop_ids = ()
    texts, prefix = ["fridge opened", "stove", "a chair is occupied"], "<|im_start|>system\nYou name activities.<|im_end|>\n<|im_start|>"
    asked = [Request(text, f"user\n{text}<|im_end|>\n", prefix, sampling=Sampling(temperature=0, max_new_tokens=6)) for text in texts]
    ours = load_model(model, "cpu", "float32")
    tokenizer.vocab_size = ours.config.vocab_size  # llama.cpp does not know which rows of the head are padding
    expected = {done.request.window: done.ids for done in Generator(ours, tokenizer).generate(asked)}
    ids, owns = tokenizer.encode(prefix), [tokenizer.encode(one.prompt) for one in asked]
    vocab_size = write_gguf(model, tmp_path / "model.gguf", "float32").vocab_size
    other = LlamaCpp(tmp_path / "model.gguf", ids, 3, len(ids) + max(map(len, owns)) + 6, vocab_size, unified)
    for _ in range(2):
        assert other.generate(owns, 6) == [expected[text] for text in texts]
    other.close()
