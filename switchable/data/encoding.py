"""Texts -> token ids with any tokenizer, many at once, in pieces where a text is long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 200_000  # longer texts are encoded in pieces, so that memory stays bounded
BATCH_CHARS = 2_000_000  # of text encoded at once


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], dtype: npt.DTypeLike = np.int64
) -> list[npt.NDArray[np.integer]]:
    """Return the token ids of each text, without any special token and without truncation or padding."""
    encoded: list[list[npt.NDArray[np.integer]]] = [[] for _ in texts]
    owners: list[int] = []
    pieces: list[str] = []

    def flush() -> None:
        for owner, ids in zip(owners, _encode(tokenizer, pieces), strict=True):
            encoded[owner].append(np.array(ids, dtype))
        owners.clear()
        pieces.clear()

    waiting = 0
    for owner, text in enumerate(texts):
        for piece in _pieces(text):
            owners.append(owner)
            pieces.append(piece)
            waiting += len(piece)
            if waiting >= BATCH_CHARS:
                flush()
                waiting = 0
    flush()
    return [np.concatenate(parts) for parts in encoded]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        yield from encoded["input_ids"]
        return
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # spelled-out special tokens are text
    yield from (row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False))


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text after a line break, or else before a space: tokens hardly ever reach across."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        limit = start + PIECE_CHARS
        line = text.rfind("\n", max(start, limit - 9_000), limit)
        word = text.rfind(" ", max(start, limit - 500), limit)
        cut = line + 1 if line >= 0 else word if word > start else limit
        yield text[start:cut]
        start = cut
    yield text[start:]
