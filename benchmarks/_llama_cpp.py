"""llama.cpp as a contender of `benchmarks.decode`: the same shape and weights, at several widths, several sequences.

Its gpt2 graph has GELU built in, so what it writes is not what the model says. It takes as long: every weight is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor

from benchmarks._gguf import write_gguf

KINDS = {"F32": "float32", "BF16": "bf16", "Q8_0": "q8_0", "Q4_0": "q4_0"}
"""GGUF's widths, and how they are called in the names of figures."""


class LlamaCpp:
    """A model in every width.

    Args:
        model: a GPT-2 of transformers, converted or not.
    """

    def __init__(self, model: Any):
        llama_cpp.llama_log_set(_QUIET, None)
        self.models = {}
        with tempfile.TemporaryDirectory() as folder:
            for kind, name in KINDS.items():
                path = Path(folder) / f"{kind}.gguf"
                write_gguf(model, path, kind)
                settings = llama_cpp.llama_model_default_params()
                settings.use_mmap = False
                self.models[name] = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)

    def calls(self, ids_BS: Tensor, new_tokens: int) -> dict[str, Callable[[], object]]:
        """Return what writes so many tokens after each prompt, greedily, by the contender's name."""
        return {f"llamacpp_{name}": _Writer(each, ids_BS, new_tokens) for name, each in self.models.items()}


class _Writer:
    """One width, with memory for some prompts and what comes after them."""

    def __init__(self, model: Any, ids_BS: Tensor, new_tokens: int):
        sequences, length = ids_BS.shape
        self.ids_BS, self.new_tokens = ids_BS.tolist(), new_tokens
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * (length + new_tokens)
        settings.n_batch = settings.n_ubatch = max(512, sequences * length)
        settings.n_seq_max = sequences
        settings.kv_unified = sequences == 1
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def __call__(self) -> list[list[int]]:
        """Return the new tokens of each sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        given, seen = self.ids_BS, 0
        written: list[list[int]] = [[] for _ in given]
        for _ in range(self.new_tokens):
            last = self._decode(given, seen)
            seen += len(given[0])
            given = [[int(np.argmax(logits_V))] for logits_V in last]
            for row, (token,) in zip(written, given, strict=True):
                row.append(token)
        return written

    def _decode(self, ids_BS: list[list[int]], seen: int) -> list[Any]:
        """Return the logits after the last token of each sequence."""
        batch, ends = self.batch, []
        batch.n_tokens = 0
        for sequence, ids in enumerate(ids_BS):
            for place, token in enumerate(ids):
                n, is_last = batch.n_tokens, place == len(ids) - 1
                batch.token[n], batch.pos[n], batch.logits[n] = token, seen + place, is_last
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.n_tokens += 1
            ends.append(batch.n_tokens - 1)
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp found no room in its cache for these sequences")
        pointers = [llama_cpp.llama_get_logits_ith(self.context, end) for end in ends]
        return [np.ctypeslib.as_array(pointer, (self.vocabulary,)) for pointer in pointers]


@llama_cpp.llama_log_callback
def _QUIET(_level: int, _text: bytes, _data: object) -> None:
    """Say nothing."""
