"""Causal language modelling: predict each token from those before it.

The labels are the inputs; `transformers` shifts them by one. Where the tokenizer puts a begin of text before a text by
itself, as Llama's and Gemma's do, every sequence begins with it, and so does a prompt later on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from switchable.arrays import Ints
from switchable.data.objectives.masked import IGNORED
from switchable.data.tokenizers import added_tokens
from switchable.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalLM:
    """Windows as they are, behind the begin of text."""

    window: int  # tokens of text in a sequence
    leading: tuple[int, ...] = ()  # ids of the begin of text
    name: ClassVar[str] = "causal"
    unit: ClassVar[str] = "nats per token"

    def __call__(self, ids_BW: Ints, rows_B: Ints, seed: int) -> dict[str, Ints]:  # noqa: ARG002 - as all objectives
        """Return `input_ids` [B, S] and `labels`, the same but -100 for the begin of text."""
        if not self.leading:
            return {"input_ids": ids_BW, "labels": ids_BW}
        before = np.broadcast_to(np.array(self.leading), (len(ids_BW), len(self.leading)))
        ids_BS, labels_BS = (np.hstack([b, ids_BW]) for b in (before, np.full_like(before, IGNORED)))
        return {"input_ids": ids_BS, "labels": labels_BS}

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> CausalLM:
        """Return the objective for a tokenizer; InputError if a sequence has no room for text."""
        leading, _ = added_tokens(tokenizer)
        if sequence_length < len(leading) + 2:
            raise InputError(f"sequence_length={sequence_length} leaves nothing to predict; use 16 or more")
        return cls(sequence_length - len(leading), tuple(leading))
