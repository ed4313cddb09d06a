"""Optimizers whose state cannot move are refused at the first step, and nothing has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from switching.training import CONFIG, muon_and_adamw, steppers, train
from torch import Tensor, nn

from switchable import InputError
from switchable.ffn.convert import layers_of
from switchable.switching.controller import Controller


class _Quantised(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moment_8bit"] = torch.zeros_like(p, dtype=torch.uint8)


class _Subclass(Tensor):
    """Stands for a tensor of quantised blocks."""


class _OfATensorType(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moment"] = torch.zeros_like(p).as_subclass(_Subclass)


class _Flat(torch.optim.SGD):
    """All moments in one vector, kept with the first parameter, which is none of a neuron's."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        params = self.param_groups[0]["params"]
        self.state[params[0]]["all"] = torch.cat([p.flatten() for p in params]).detach()


class _Hidden(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.kept = {"moments": [p.detach().clone() for g in self.param_groups for p in g["params"]]}


class _Listed(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [p.detach().clone()]


class _Contiguous(torch.optim.SGD):
    """Makes parameters contiguous when it has made its state like them, as bitsandbytes does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("moment", torch.zeros_like(p))
            p.data = p.data.contiguous()
        super().step(closure)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "whole numbers": (lambda m: _Quantised(m.parameters(), lr=0.1), "'moment_8bit' of optimizer _Quantised"),
    "a tensor type": (
        lambda m: _OfATensorType(m.parameters(), lr=0.1),
        "'moment' of optimizer _OfATensorType",
    ),
    "one vector of all": (lambda m: _Flat(m.parameters(), lr=0.1), "'all' of optimizer _Flat"),
    "kept elsewhere": (lambda m: _Hidden(m.parameters(), lr=0.1), "_Hidden keeps a tensor .* 'kept'"),
    "a list": (lambda m: _Listed(m.parameters(), lr=0.1), "'history' of optimizer _Listed .*list"),
    "contiguous parameters": (
        lambda m: _Contiguous(m.parameters(), lr=0.1),
        "_Contiguous wants contiguous parameters: .* 'moment'; begin anew with .*neuron_major=False",
    ),
    "one of two": (lambda m: muon_and_adamw(m)[:1], "router of .* none of the optimizers"),
    "the other of two": (lambda m: muon_and_adamw(m)[1:], "FFN of .* none of the optimizers"),
    "none": (lambda _: "adamw", "no optimizer in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_move_is_refused_at_the_first_step_and_nothing_moves(
    switchable_gpt2: nn.Module, tokens: Tensor, name: str
) -> None:
    build, message = REFUSED[name]
    given = build(switchable_gpt2)
    controller = Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG)
    train(switchable_gpt2, [each for each in steppers(given) if hasattr(each, "step")], tokens, 1)
    weights = copy.deepcopy(switchable_gpt2.state_dict())
    with pytest.raises(InputError, match=message):
        controller.step(given)
    assert controller.steps_done == 0
    assert all(torch.equal(t, weights[n]) for n, t in switchable_gpt2.state_dict().items())


def test_frozen_routers_are_refused(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    for layer in layers_of(switchable_gpt2):
        layer.router.requires_grad_(False)
    controller = Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG)
    with pytest.raises(InputError, match=r"router of .* is frozen .* modules_to_save"):
        controller.step(torch.optim.AdamW(switchable_gpt2.parameters()))


def test_an_optimizer_without_memory_may_step_beside_another(
    switchable_gpt2: nn.Module, tokens: Tensor
) -> None:
    first, *rest = switchable_gpt2.parameters()
    plain, adamw = SimpleNamespace(param_groups=[{"params": [first]}]), torch.optim.AdamW(rest)
    for given in ((plain, adamw), (adamw, plain)):
        assert Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG).step(*given)


def test_frozen_ffns_need_no_optimizer(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    for layer in layers_of(switchable_gpt2):
        for projection in (layer.ssd.up_projection, layer.ssd.down_projection):
            projection.requires_grad_(False)
    trained = [p for p in switchable_gpt2.parameters() if p.requires_grad]
    assert Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG).step(torch.optim.AdamW(trained))
