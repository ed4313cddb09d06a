"""Which tokens make a word together: WordPiece by its "##", any other vocabulary by its letters and digits.

A token goes on with the word before it when the word ends and the token begins with a letter or digit (bytes of a
character that is cut in two count as letters), without a space between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from switchable.arrays import Bools, Ints
from switchable.data.tokenizers import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class WordParts:
    """For every token id, whether a word may go on before it and after it."""

    joins_before_V: Bools
    joins_after_V: Bools

    def starts(self, ids_BS: Ints) -> Bools:
        """Return which tokens start a word: [B, S]; the first of a row always does."""
        starts_BS = np.ones(ids_BS.shape, bool)
        starts_BS[:, 1:] = ~(self.joins_before_V[ids_BS[:, 1:]] & self.joins_after_V[ids_BS[:, :-1]])
        return starts_BS


def word_parts(tokenizer: PreTrainedTokenizerBase) -> WordParts:
    """Return how the tokens of a vocabulary make words; special tokens never join."""
    backend = tokenizer.backend_tokenizer
    size = vocabulary_size(tokenizer)
    before, after = np.zeros(size, bool), np.zeros(size, bool)
    prefix = getattr(backend.model, "continuing_subword_prefix", None)
    byte_level = type(backend.decoder).__name__ == "ByteLevel"
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        if number in special or not token:
            continue
        if type(backend.model).__name__ == "WordPiece" and prefix:
            before[number], after[number] = token.startswith(prefix), True
        else:
            before[number], after[number] = (_in_word(c, byte_level) for c in (token[0], token[-1]))
    return WordParts(before, after)


def _in_word(character: str, byte_level: bool) -> bool:
    # A byte-level vocabulary writes byte b up to 32 (control characters and the space) as the character 256 + b.
    return character.isalnum() and not (byte_level and 256 <= ord(character) <= 288)
