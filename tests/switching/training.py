"""Short training with any optimizers, and structures to move its neurons to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from switchable import SwitchConfig
from switchable.ffn.convert import layers_of
from switchable.switching.switch import current_structure

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, monitor_every=1, monitor_growth=1.0)


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    inside = {n for n, p in model.named_parameters() if ".h." in n and p.ndim == 2 and "router" not in n}
    named = dict(model.named_parameters())
    return [named[n] for n in named if n in inside], [p for n, p in named.items() if n not in inside]


def muon_and_adamw(model: nn.Module) -> list[Any]:
    matrices, rest = matrices_and_rest(model)
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2)]


def train(model: nn.Module, steppers: Iterable[Any], tokens: Tensor, steps: int) -> None:
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for each in steppers:
            each.step()
        model.zero_grad()


def steppers(given: Any) -> list[Any]:
    return list(given.values()) if isinstance(given, dict) else given if isinstance(given, list) else [given]


def structures(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        current_structure(layer)[torch.randperm(layer.ssd.d_ff, generator=generator)]
        for layer in layers_of(model)
    ]
