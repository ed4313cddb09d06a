"""Validation loss of one model in both modes, on the same fixed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from switchable.ffn.convert import kept_modes, set_mode
from switchable.progress import progress_bar
from switchable.ranks import sum_over_ranks


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], progress: bool = False
) -> float:
    """Return the mean loss in nats per predicted token, in the model's current mode.

    Under torch.distributed every rank calls it with its part of the batches; all get the mean over all of them.

    Args:
        model: a transformers model with a loss: causal (it predicts S - 1 tokens of each sequence of S), masked, or
            encoder-decoder.
        batches: model inputs with `labels` [B, S], -100 where nothing is predicted.
        progress: say how far the work is.
    """
    total, tokens = 0.0, 0.0
    first = 1 if shifts_labels(model) else 0
    with kept_modes(model):
        model.eval()
        for batch in progress_bar("validating", "batch", show=progress, over=batches):
            predicted = int((batch["labels"][:, first:] != -100).sum())
            # A host sync per batch: evaluation is not the training step.
            total += float(model(**batch).loss) * predicted
            tokens += predicted
    total, tokens = sum_over_ranks([total, tokens])
    return total / max(tokens, 1)


def objective_of_model(model: nn.Module) -> str:
    """Return what a transformers model predicts, by its kind: `"causal"`, `"masked"` or `"span"`."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "span"
    return "masked" if type(model).__name__.endswith("ForMaskedLM") else "causal"


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a sequence may have; None: any number.

    RoBERTa and its kin number positions from behind the padding token's id: they have fewer than their config says.
    """
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def shifts_labels(model: nn.Module) -> bool:
    """Return whether a model predicts label i + 1 at place i, as causal models do; others predict label i there."""
    return objective_of_model(model) == "causal"


def loss_in_mode(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], mode: str, progress: bool = False
) -> float:
    """Return the validation loss in `"dense"` or `"sparse"` mode; the mode the model is in is kept."""
    with kept_modes(model):
        set_mode(model, mode)
        return validation_loss(model, batches, progress)
