"""The probe of a training loop: what it may be, and whether the model takes it, found out before training begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from switchable.errors import InputError, shown
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.trial import FAILURES
from switchable.ranks import RankLost, watched
from switchable.switching.measures import Inputs, Precision, show

ProbeInputs = Inputs | Sequence[Inputs]
"""Fixed model inputs: a batch (a tensor, the model's first input, or a mapping, its inputs by name) or several."""


def as_batches(probe: ProbeInputs) -> list[Any]:
    """Return the batches of a probe; raise InputError if it is none."""
    one = isinstance(probe, (Tensor, Mapping))
    batches: list[Any] = [probe] if one else list(probe) if isinstance(probe, Sequence) else []
    good = (isinstance(batch, Tensor) or (isinstance(batch, Mapping) and batch) for batch in batches)
    if not batches or not all(good):
        raise InputError(f"probe={shown(probe)} must be token ids, a batch of model inputs, or several")
    return batches


def tokens_of(model: nn.Module, batches: Sequence[Inputs], precision: Precision) -> int:
    """Return how many tokens come to the first FFN; raise InputError if the model fails, or none come to an FFN."""
    layers = layers_of(model)
    tokens = dict.fromkeys(layers, 0)

    def count(layer: SwitchableFFN, x: Tensor) -> None:
        tokens[layer] += x.numel() // layer.ssd.d_model

    try:
        with watched(), precision():
            show(model, batches, [count] * len(layers))
    except RankLost:
        raise
    except FAILURES as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{type(model).__name__} fails with the probe ({why}); give what the loop gives the model, by the names of "
            "its inputs and on its device"
        ) from error
    if idle := [layer.ssd.name for layer in layers if not tokens[layer]]:
        raise InputError(f"the probe does not come to {idle[0]}; give one that goes through the whole model")
    return tokens[layers[0]]
