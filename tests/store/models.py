"""Models that are saved and opened again, and whether they are the same then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families.models import inputs, make, output
from torch import Tensor, nn

from switchable import SwitchConfig, convert, in_mode
from switchable.ffn.convert import layers_of
from switchable.store.checkpoint import save
from switchable.switching.switch import regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)
OLDER = Path(__file__).parent / "older"
KEPT = ("num_experts", "experts_per_token", "takes_part", "why_dense")


def trained(case: str) -> Any:
    """A converted model with routers, K and neuron order of its own, whose first FFN stays dense."""
    model = make(case)
    convert(model, CONFIG)
    layers = layers_of(model)
    regroup(layers, [(torch.arange(64) * (3 + 2 * i)) % 8 for i in range(len(layers))])
    for i, layer in enumerate(layers):
        with torch.no_grad():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(i))
        layer.ssd.experts_per_token = 2 + i
    layers[0].ssd.takes_part, layers[0].ssd.why_dense = False, "it is never „sparse“"
    return model


def saved(case: str, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """A converted, regrouped-looking model in a checkpoint's folder, and inputs for it."""
    model = make(case)
    convert(model, CONFIG)
    with torch.no_grad():  # routers that are not what conversion gives them
        for layer in layers_of(model):
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(3))
    save(folder, model)
    return model, inputs(case)


def assert_same(opened: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Both are the same switchable model."""
    for ours, theirs in zip(layers_of(opened), layers_of(model), strict=True):
        for name in KEPT:
            assert getattr(ours.ssd, name) == getattr(theirs.ssd, name), name
        assert torch.equal(ours.ssd.neuron_ids_F, theirs.ssd.neuron_ids_F)
        assert ours.ssd.settings.family == theirs.ssd.settings.family
    found = []
    for each in (opened, model):
        for mode in ("dense", "sparse"):
            with in_mode(each, mode), torch.no_grad():
                found.append(output(each.eval(), batch))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
