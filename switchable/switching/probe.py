"""The probe of a training loop: what it may be, and whether the model takes it, found out before training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from switchable.errors import InputError, shown
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.trial import FAILURES
from switchable.ranks import RankLost, watched
from switchable.switching.measures import Inputs, show


def as_batches(probe: Inputs | Sequence[Inputs]) -> list[Any]:
    """Return the batches of a probe.

    Raises:
        InputError: it is none.
    """
    one = isinstance(probe, (Tensor, Mapping))
    batches: list[Any] = [probe] if one else list(probe) if isinstance(probe, Sequence) else []
    good = (isinstance(batch, Tensor) or (isinstance(batch, Mapping) and batch) for batch in batches)
    if not batches or not all(good):
        raise InputError(f"probe={shown(probe)} must be token ids, a batch of model inputs, or several")
    return batches


class _Count:
    """How many tokens come to a layer."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, layer: SwitchableFFN, x: Tensor) -> None:
        """Take in the layer's input, as an `Observer` does."""
        self.tokens += x.numel() // layer.ssd.d_model


def tokens_of(
    model: nn.Module, batches: Sequence[Inputs], precision: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Return how many tokens the probe brings to the model's first FFN.

    Raises:
        InputError: the model fails with it, or it does not come to all FFNs.
    """
    layers = layers_of(model)
    counts = [_Count() for _ in layers]
    try:
        with watched(), precision():
            show(model, batches, counts)
    except RankLost:
        raise
    except FAILURES as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{type(model).__name__} fails with the probe ({why}); give what the loop gives the model, by the names of "
            "its inputs and on its device"
        ) from error
    idle = [layer.ssd.name for layer, count in zip(layers, counts, strict=True) if not count.tokens]
    if idle:
        raise InputError(f"the probe does not come to {idle[0]}; give one that goes through the whole model")
    return counts[0].tokens
