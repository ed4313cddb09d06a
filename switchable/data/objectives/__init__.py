"""What a model learns to predict: windows of text -> model inputs and labels.

    causal.py    the next token                                             GPT   (labels = inputs)
    masked.py    15 % of the tokens, from all the others                    BERT  (Devlin et al. 2019)
    spans.py     15 % of the tokens, in spans, written out one by one       T5    (Raffel et al. 2020)

An objective is a function without a state: `objective(ids_BW, rows_B, seed)` takes B windows of W tokens of text,
the number that each row has among all rows of the run, and the seed. What is masked in a row depends on (seed, row
number) alone, so a run resumes bitwise from the one integer it has reached, any number of ranks sees the same masks,
and validation is the same every time. Data collators of `transformers` draw from a generator with a state instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from switchable.arrays import Ints
from switchable.data.config import ObjectiveConfig
from switchable.data.objectives.causal import CausalLM
from switchable.data.objectives.masked import MaskedLM
from switchable.data.objectives.spans import SpanCorruption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Objective(Protocol):
    """Windows of text -> the arrays a model is trained on."""

    name: ClassVar[str]  # `"causal"`, `"masked"` or `"span"`
    unit: ClassVar[str]  # of the loss

    @property
    def window(self) -> int:
        """Tokens of text in a sequence (W); what else a sequence holds is added by the objective."""

    def __call__(self, ids_BW: Ints, rows_B: Ints, seed: int) -> dict[str, Ints]:
        """Return `input_ids` and `labels` (-100 where nothing is predicted)."""
        ...


def build_objective(
    name: str, config: ObjectiveConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Objective:
    """Return the objective `"causal"`, `"masked"` or `"span"`, for sequences of a given length.

    `sequence_length` is the tokens that the model (for T5: its encoder) sees at a time (S). Raises InputError for a
    tokenizer without the special tokens that the objective wants, or a sequence too short.
    """
    if name == "masked":
        return MaskedLM.build(config, tokenizer, sequence_length)
    if name == "span":
        return SpanCorruption.build(config, tokenizer, sequence_length)
    return CausalLM.build(tokenizer, sequence_length)
