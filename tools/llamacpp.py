"""llama.cpp as a contestant of tools/bench_generate.py: a checkpoint as a GGUF file, and batches of windows behind one shared prefix.

The packages `gguf` and `llama-cpp-python` (built from source for this processor) are asked for by nothing else. The file keeps the weights'
dtype, norms in float32 as llama.cpp wants them, and no vocabulary: ids go in and come out. A batch's windows take over the prefix's cells
of the cache (half precision, llama.cpp's default) without computing them: by pointing to them in one `unified` cache, or as copies in a
cache of their own. Each step decodes all of them at once, greedily.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch

from harkd.qwen3.config import Qwen3Config
from harkd.qwen3.weights import load_model

CHUNK = 512  # tokens of a call, and of one product within
KINDS = {torch.bfloat16: gguf.GGMLQuantizationType.BF16, torch.float16: gguf.GGMLQuantizationType.F16}  # others are written as float32
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)  # C calls it until the process ends


def write_gguf(folder: str, path: Path, dtype: str) -> Qwen3Config:
    """Write a dense checkpoint's weights as a GGUF file without a vocabulary."""
    model = load_model(folder, "cpu", dtype)
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, weight in model.named_parameters():
        weight, place = weight.detach(), names.get_name(name, try_suffixes=(".weight",))
        if weight.dtype in KINDS and weight.dim() > 1:
            writer.add_tensor(place, weight.view(torch.int16).numpy(), raw_shape=weight.shape, raw_dtype=KINDS[weight.dtype])
        else:
            writer.add_tensor(place, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


class LlamaCpp:
    """A model in llama.cpp with room for `sequences` of `tokens` each, the prefix among them, which is computed here, once."""

    def __init__(self, path: Path, prefix: Sequence[int], sequences: int, tokens: int, vocab_size: int, unified: bool) -> None:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = len(prefix) + sequences * (tokens - len(prefix)) if unified else (sequences + 1) * tokens
        how.n_seq_max, how.kv_unified = sequences + 1, unified
        how.n_batch = how.n_ubatch = CHUNK
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {path} with room for {how.n_ctx} tokens")
        self.memory, self.batch = llama_cpp.llama_get_memory(self.context), llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.prefix, self.vocab_size = len(prefix), vocab_size
        self._decode([(id, place, 0, False) for place, id in enumerate(prefix)])

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """The `new` likeliest tokens behind the prefix and each of the prompts, all of which run at once."""
        for sequence in range(1, len(prompts) + 1):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        own = [(id, self.prefix + i, s, i == len(prompt) - 1) for s, prompt in enumerate(prompts, 1) for i, id in enumerate(prompt)]
        written = [[id] for id in self._decode(own)]
        for step in range(new - 1):
            places = [self.prefix + len(prompt) + step for prompt in prompts]
            rows = [(ids[-1], place, i, True) for i, (ids, place) in enumerate(zip(written, places, strict=True), 1)]
            for ids, id in zip(written, self._decode(rows), strict=True):
                ids.append(id)
        for sequence in range(1, len(prompts) + 1):
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        return written

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest next token of those rows (id, position, sequence, whether it is asked for) that ask for it."""
        found = []
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            self.batch.n_tokens = len(some)
            for i, (id, position, sequence, asked) in enumerate(some):
                self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = id, position, asked
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            if llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError("llama.cpp could not decode a batch")
            for i, row in enumerate(some):
                if row[3]:
                    logits = llama_cpp.llama_get_logits_ith(self.context, i)
                    found.append(int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()))
        return found
