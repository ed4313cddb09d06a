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
    """Return what makes a model switchable besides its routers' weights: plain values for `make_switchable`."""
    first, *_ = layers = layers_of(model)
    names = ("experts_per_token", "takes_part", "why_dense")
    described = {
        "num_experts": first.ssd.num_experts,
        "family": [
            dataclasses.asdict(each) for each in dict.fromkeys(layer.ssd.settings.family for layer in layers)
        ],
        "layers": {layer.ssd.name: {name: getattr(layer.ssd, name) for name in names} for layer in layers},
    }
    return described if first.has_dense_mode else described | {"gate": "softmax"}


def make_switchable(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Convert a plain model to what `describe` returned for another; the routers' weights are still to be loaded.

    The same layers may stand under another head: `h.0.mlp` of one model may be `transformer.h.0.mlp` of the other.

    Raises:
        InputError: the description does not fit the model, or is that of a mixture of experts with scaled outputs.
    """
    if described.get("gate", "unit") != "unit":
        raise InputError(
            "this model is the baseline `moe` of a comparison: its experts' outputs are scaled, so it has no dense "
            "mode and cannot be opened as a switchable model; its figures are in the comparison's table"
        )
    family = described.get("family")
    if family is not None:  # one alone in a description of version 0.2
        family = [Family.from_values(each) for each in (family if isinstance(family, list) else [family])]
    config = SwitchConfig(num_experts=described["num_experts"], experts_per_token=1)
    convert(model, config, family, trusted=family is not None)
    for layer in layers_of(model):
        stored = _entry(layer.ssd.name, described["layers"])
        layer.ssd.set_experts_per_token(stored["experts_per_token"])
        layer.ssd.takes_part = stored["takes_part"]
        layer.ssd.why_dense = stored.get("why_dense", "")  # which version 0.1 did not write


def _entry(name: str, stored: Mapping[str, Any]) -> Any:
    """Return what is stored for a layer, under its own name or one that begins otherwise.

    Raises:
        InputError: there is nothing.
    """
    for other in (name, *stored):
        if other in stored and (f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")):
            return stored[other]
    raise InputError(f"the description of the experts has none for {name}; it is another model's")
