"""Validation loss of one model in both modes, on the same fixed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from switchable.ffn.convert import kept_modes, set_mode
from switchable.ranks import sum_over_ranks


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the mean loss in nats per predicted token, in the model's current mode.

    Under torch.distributed every rank calls it with its part of the batches; all get the mean over all of them.

    Args:
        model: a transformers causal language model (it predicts S - 1 tokens of each sequence of S).
        batches: model inputs with `input_ids` [B, S] and `labels`.
    """
    total, tokens = 0.0, 0.0
    with kept_modes(model):
        model.eval()
        for batch in batches:
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            # A host sync per batch: evaluation is not the training step.
            total += float(model(**batch).loss) * predicted
            tokens += predicted
    total, tokens = sum_over_ranks([total, tokens])
    return total / max(tokens, 1)


def loss_in_mode(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], mode: str) -> float:
    """Return the validation loss in `"dense"` or `"sparse"` mode; the mode the model is in is kept."""
    with kept_modes(model):
        set_mode(model, mode)
        return validation_loss(model, batches)
