"""What makes a model switchable besides its weights, as plain values: kept beside them, and made into layers again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from switchable.errors import InputError
from switchable.ffn.convert import convert, layers_of
from switchable.ffn.families import Family
from switchable.settings import SwitchConfig


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what makes a model switchable besides its routers' weights: plain values, as `make_switchable` takes
    them."""
    layers = layers_of(model)
    return {
        "num_experts": layers[0].num_experts,
        "gate": layers[0].expert_gate,
        "family": dataclasses.asdict(layers[0].family),
        "layers": {
            layer.name: {"experts_per_token": layer.experts_per_token, "takes_part": layer.takes_part}
            for layer in layers
        },
    }


def make_switchable(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Convert a plain model to what `describe` returned for another; the routers' weights are still to be loaded.

    Raises:
        InputError: the description does not fit the model.
    """
    family = described.get("family")
    if family is not None:
        classes = family["ffn"]
        family = Family(**{**family, "ffn": classes if isinstance(classes, str) else tuple(classes)})
    convert(model, SwitchConfig(num_experts=described["num_experts"], experts_per_token=1), family)
    for layer in layers_of(model):
        if layer.name not in described["layers"]:
            raise InputError(
                f"the description of the experts has none for {layer.name}; it is another model's"
            )
        stored = described["layers"][layer.name]
        layer.expert_gate = described.get("gate", "unit")
        layer.set_experts_per_token(stored["experts_per_token"])
        layer.takes_part = stored["takes_part"]
