"""Small sources, a corpus and a tokenizer of words, for the tests of data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from switchable.data import tokens
from switchable.data.config import DataConfig
from switchable.data.corpora import documents
from switchable.data.tokens import PreparedData, Split
from switchable.errors import InputError

TEXTS = [
    f"document {i}: the number {i * 7919} has {i % 7} as its rest, é€😀\n" * (1 + i % 5) for i in range(200)
]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def config_for(source: Path, **settings: Any) -> DataConfig:
    return DataConfig(data=(str(source),), **({"vocab_size": 300} | settings))


def documents_in(data: PreparedData, split: Split) -> list[str]:
    """The documents of a token file, decoded by plain transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(data.tokenizer_path), local_files_only=True)
    ids = np.fromfile(split.path, dtype=data.dtype).tolist()
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == data.end_of_text.id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == []
    return [tokenizer.decode(document) for document in documents]


def save_word_tokenizer(folder: Path, words: int = 10, **special: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(3)  # some published tokenizers come with one; it must not cut documents
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(
        str(folder)
    )
    return folder


def write_zst(path: Path, data: bytes) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(data)
    return path


def jsonl(*texts: str, key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in texts)


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        list(documents(*args, **kwargs))
    return str(caught.value)


def hash_of(text: str) -> int:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)


def lock_of(config: DataConfig) -> str:
    return f".{tokens._fingerprint(config, 'causal')}.lock"
