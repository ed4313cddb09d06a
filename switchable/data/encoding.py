"""Texts -> token ids with any tokenizer, many at once, in pieces where a text is long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 200_000  # longer texts are encoded in pieces, so that memory stays bounded
BATCH_CHARS = 2_000_000  # of text encoded at once


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], dtype: npt.DTypeLike = np.int64
) -> Iterator[npt.NDArray[np.integer]]:
    """Yield the token ids of each text, without any special token and without truncation or padding.

    Texts are read ahead, `BATCH_CHARS` or a little more at once.
    """
    pieces = ((number, piece) for number, text in enumerate(texts) for piece in _pieces(text))

    def encoded() -> Iterator[tuple[int, list[int]]]:
        while batch := list(_next(pieces)):
            numbers, parts = zip(*batch, strict=True)
            yield from zip(numbers, _encode(tokenizer, parts), strict=True)

    for _, found in groupby(encoded(), key=itemgetter(0)):
        yield np.concatenate([np.array(ids, dtype) for _, ids in found])


def _next(pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The pieces to encode at once; none when all are done."""
    chars = 0
    for number, piece in pieces:
        yield number, piece
        chars += len(piece)
        if chars >= BATCH_CHARS:
            return


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:  # a tokenizer written in Python
        encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
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
