"""Masked language modelling: hide 15 % of the tokens, predict them from all the others.

Of the tokens chosen, 80 % become the mask token, 10 % a random ordinary token, and 10 % stay what they are; the loss
is taken on the chosen ones only. The share is exact in every row (rounded), so that batches weigh alike; special
tokens are never chosen. With `whole_words`, words are chosen as a whole, in random order, as long as they fit into
that share.

A sequence is [CLS] text [SEP] where the tokenizer has these tokens, and plain text where not. The text runs on across
documents, which end in a [SEP] of their own.

Source: Devlin et al. 2019 (BERT); packed sequences: Liu et al. 2019 (RoBERTa, FULL-SENTENCES).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from switchable.arrays import Bools, Floats, Ints
from switchable.data.config import ObjectiveConfig
from switchable.data.objectives.chance import uniforms
from switchable.data.objectives.words import WordParts, word_parts
from switchable.data.tokenizers import vocabulary_size
from switchable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of what is not predicted, in torch and transformers
BECOMES_MASK = 0.8  # share of the chosen tokens
BECOMES_RANDOM = 0.1


@dataclass(frozen=True)
class MaskedLM:
    """BERT's objective on windows of W tokens."""

    window: int  # tokens of text in a sequence
    fraction: float  # share of the ordinary tokens that is predicted
    mask_id: int
    special_V: Bools  # which token ids are special: never chosen, never drawn at random
    around: tuple[int, int] | None = None  # ids of [CLS] and [SEP], put around the text; None: nothing is
    words: WordParts | None = None  # how tokens make words, to choose whole ones; None: choose single tokens
    name: ClassVar[str] = "masked"
    unit: ClassVar[str] = "nats per masked token"

    @classmethod
    def build(
        cls, config: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int
    ) -> MaskedLM:
        """Return the objective for a tokenizer; InputError: no mask token, or no room for text in a sequence."""
        if tokenizer.mask_token_id is None:
            raise InputError(
                "the tokenizer has no mask token, which objective=masked needs; give one that has (BERT's, say, or "
                "one with mask_token in its tokenizer_config.json), or none to train one here"
            )
        special_V = np.zeros(vocabulary_size(tokenizer), bool)
        special_V[tokenizer.all_special_ids] = True
        if special_V.all():
            raise InputError("the tokenizer has special tokens only: there is nothing to mask")
        cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        around = None if cls_id is None or sep_id is None else (int(cls_id), int(sep_id))
        if (window := sequence_length - (2 if around else 0)) < 2:
            raise InputError(f"sequence_length={sequence_length} leaves no room for text; use 16 or more")
        words = word_parts(tokenizer) if config.whole_words else None
        return cls(window, config.mask_fraction, int(tokenizer.mask_token_id), special_V, around, words)

    def __call__(self, ids_BW: Ints, rows_B: Ints, seed: int) -> dict[str, Ints]:
        """Return `input_ids` [B, S] with tokens hidden, and `labels` [B, S]: these tokens, -100 elsewhere."""
        ids_BS = ids_BW
        if self.around is not None:
            ids_BS = np.pad(ids_BW, ((0, 0), (1, 1)), constant_values=((0, 0), self.around))
        rows, length = ids_BS.shape
        drawn_B3S = uniforms(seed, rows_B, 3 * length).reshape(rows, 3, length)
        order_BS, fate_BS, draw_BS = drawn_B3S.swapaxes(0, 1)
        chosen_BS = self.choose(ids_BS, order_BS)
        ordinary = np.flatnonzero(~self.special_V)
        random_BS = ordinary[(draw_BS * len(ordinary)).astype(np.int64)]
        hidden_BS = np.where(fate_BS < BECOMES_MASK, self.mask_id, random_BS)
        changed_BS = chosen_BS & (fate_BS < BECOMES_MASK + BECOMES_RANDOM)
        labels_BS = np.where(chosen_BS, ids_BS, IGNORED)
        return {"input_ids": np.where(changed_BS, hidden_BS, ids_BS), "labels": labels_BS}

    def choose(self, ids_BS: Ints, order_BS: Floats) -> Bools:
        """Return which tokens are predicted: [B, S].

        A word is as early in the random order as its first token's number in `order_BS` is small.
        """
        rows, length = ids_BS.shape
        maskable_BS = ~self.special_V[ids_BS]
        wanted_B = np.maximum(1, np.rint(self.fraction * maskable_BS.sum(1)).astype(np.int64))
        starts_BS = np.ones_like(maskable_BS)
        if self.words is not None:
            starts_BS = self.words.starts(ids_BS) | ~maskable_BS
        starts_BS[:, 1:] |= ~maskable_BS[:, :-1]
        place = np.arange(length)
        first_BS = np.maximum.accumulate(np.where(starts_BS, place, 0), axis=1)
        word = np.cumsum(starts_BS) - 1  # numbered through all rows: every row starts a word
        word_length_BS = np.bincount(word)[word].reshape(rows, length)
        key_BS = np.where(maskable_BS, np.take_along_axis(order_BS, first_BS, 1), np.inf)
        sorted_BS = np.argsort(key_BS, axis=1, kind="stable")
        rank_BS = np.empty_like(sorted_BS)
        np.put_along_axis(rank_BS, sorted_BS, np.broadcast_to(place, (rows, length)), 1)
        # The tokens of a word stand side by side in the random order: it begins at this rank.
        word_rank_BS = rank_BS - (place - first_BS)
        fits_BS = word_rank_BS + word_length_BS <= wanted_B[:, None]
        # A first word that is too long is better than none.
        chosen_BS: Bools = maskable_BS & (fits_BS | (word_rank_BS == 0))
        return chosen_BS
