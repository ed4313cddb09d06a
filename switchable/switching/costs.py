"""What each layer of a model costs, multiplied in each way: what recipe `auto` weighs, timed once, when a run starts.

    dense     every neuron                                     seconds
    active    a dense step from the active neurons alone       seconds = base + slope · activation ratio
    sparse    K of E experts, chosen by products in 8 bits     seconds = base + slope · K/E

All forward and backward, in turns (`compute/measured.py`). Layers of one shape are timed once. What was found belongs
to the run: it lies in every checkpoint, so that a resumed run takes the same steps on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from switchable.compute.measured import FFN, Costs, Line, costs
from switchable.ffn.active_training import input_like, skips
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.ssd import SSD
from switchable.ranks import from_main
from switchable.switching.measures import Precision


def costs_of_layers(layers: Sequence[SwitchableFFN], tokens: int, precision: Precision) -> tuple[Costs, ...]:
    """Time the ways of every layer; all ranks get what rank 0 measured.

    Args:
        layers: of the model.
        tokens: of a forward pass.
        precision: the context in which they are multiplied.
    """
    with precision():
        kinds = [
            (_dtype(layer.ssd.up_projection.weight), skips(layer.ssd, input_like(layer.ssd, tokens), 0.0))
            for layer in layers
        ]
    return from_main(
        tuple(_costs(layer.ssd, tokens, *kind) for layer, kind in zip(layers, kinds, strict=True))
    )


def in_bfloat16(layer: SwitchableFFN, precision: Precision) -> bool:
    """Return whether a layer multiplies in bfloat16 in that context."""
    with precision():
        return _dtype(layer.ssd.up_projection.weight) == torch.bfloat16


def _costs(ssd: SSD, tokens: int, dtype: torch.dtype, can_skip: bool) -> Costs:
    device, activation = ssd.up_projection.weight.device.type, ssd.settings.activation
    ffn = FFN(ssd.d_model, ssd.d_ff, activation, ssd.gate_projection is not None, tokens, device)
    return costs(ffn, ssd.num_experts, "bfloat16" if dtype == torch.bfloat16 else "float32", can_skip)


def _dtype(weight: Tensor) -> torch.dtype:
    """Return what a product with a weight is multiplied in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def plain(found: Iterable[Costs]) -> list[dict[str, Any]]:
    """Return costs as a file keeps them."""
    return [each._asdict() for each in found]


def from_plain(stored: Iterable[dict[str, Any]]) -> tuple[Costs, ...]:
    """Return what `plain` was given."""
    return tuple(
        Costs(
            each["tokens"],
            each["dense"],
            Line(*each["active"]) if each["active"] else None,
            Line(*each["sparse"]),
        )
        for each in stored
    )
