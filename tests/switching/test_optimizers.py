"""Other people's optimizers: after their neurons have moved, training goes on as if they had not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from switching.training import matrices_and_rest, muon_and_adamw, steppers, structures, train
from torch import Tensor, nn

from switchable.ffn.convert import layers_of
from switchable.switching.optimizers import check_state, optimizers_in
from switchable.switching.switch import regroup


class StackedMuon(torch.optim.Optimizer):
    """Muon for matrices of one shape, all in one batch: the first of a group keeps the state of all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            first, params = group["params"][0], group["params"]
            gradients = torch.stack([p.grad for p in params])
            state = self.state[first]
            moment = state.setdefault("momentum", torch.zeros_like(gradients))
            rows = state.setdefault("rows", torch.zeros_like(gradients[..., :1]))
            moment.lerp_(gradients, 0.1)
            rows.lerp_(moment.square().mean(-1, keepdim=True), 0.1)
            for p, update in zip(params, moment / (rows.sqrt() + 1e-8), strict=True):
                u, _, vt = torch.linalg.svd(update, full_matrices=False)
                p.sub_(0.02 * (u @ vt))


class Lookahead:
    """Slow weights beside an optimizer's fast ones (Zhang et al. 2019), as wrappers are often written."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {"slow": p.detach().clone()} for group in self.param_groups for p in group["params"]
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p, kept in self.state.items():
                p.copy_(kept["slow"].lerp_(p, 0.5))


def stacked_muon_and_adamw(model: nn.Module) -> dict[str, Any]:
    matrices, rest = matrices_and_rest(model)
    shapes = sorted({tuple(p.shape) for p in matrices})
    groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
    return {"muon": StackedMuon(groups, {}), "adamw": torch.optim.AdamW(rest, lr=1e-2)}


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "muon and adamw": muon_and_adamw,
    "stacked muon and adamw": stacked_muon_and_adamw,
    "lookahead": lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "accelerate's wrapper": lambda model: _Wrapper(torch.optim.AdamW(model.parameters(), lr=1e-2)),
}
BFLOAT16 = {"muon and adamw": 1e-2}
"""Differences allowed where an optimizer itself multiplies in bfloat16; unmoved state gives 2e-2 and 5e-2."""


class _Wrapper:
    """Passes everything on, state too, as accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("only_layer", [None, 1])
@pytest.mark.parametrize("name", MOVES)
def test_training_goes_on_as_if_the_neurons_had_not_moved(
    switchable_gpt2: nn.Module, tokens: Tensor, name: str, only_layer: int | None
) -> None:
    model = switchable_gpt2
    given = MOVES[name](model)
    train(model, steppers(given), tokens, 3)
    unmoved, unmoved_given = copy.deepcopy((model, given))
    wanted: list[Tensor | None] = list(structures(model))
    if only_layer is not None:
        wanted = [labels if i == only_layer else None for i, labels in enumerate(wanted)]
    found = optimizers_in(given)
    check_state(layers_of(model), found)
    perms = regroup(layers_of(model), wanted, found)
    assert [perm is not None for perm in perms] == [labels is not None for labels in wanted]
    train(model, steppers(given), tokens, 3)
    train(unmoved, steppers(unmoved_given), tokens, 3)
    for layer, other, perm in zip(layers_of(model), layers_of(unmoved), perms, strict=True):
        rows = other.ssd.weights.up_FD if perm is None else other.ssd.weights.up_FD[perm]
        torch.testing.assert_close(layer.ssd.weights.up_FD, rows, rtol=1e-4, atol=BFLOAT16.get(name, 1e-5))
    here, there = model(input_ids=tokens).logits, unmoved(input_ids=tokens).logits
    torch.testing.assert_close(here, there, rtol=1e-4, atol=BFLOAT16.get(name, 1e-4))
