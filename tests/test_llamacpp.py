"""tools.llamacpp: where llama.cpp is installed, it writes harkd's tokens from the same weights."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from tests.door_cases import model  # noqa: F401
from tests.test_bench_generate import greedy
from tools.llamacpp import LlamaCpp, write_gguf


@pytest.mark.parametrize("unified", [True, False])
def test_llamacpp_writes_the_same(model, tmp_path, unified):
    prefix, owns, expected = greedy(model)
    vocab_size = write_gguf(model, tmp_path / "model.gguf", "float32").vocab_size
    other = LlamaCpp(tmp_path / "model.gguf", prefix, 3, len(prefix) + max(map(len, owns)) + 6, vocab_size, unified)
    for _ in range(2):
        assert other.generate(owns, 6) == expected
    other.close()
