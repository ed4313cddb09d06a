"""Regrouping moves neurons, weights and optimizer state together, and changes nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support import HomeMade
from torch import Tensor, nn

from switchable import Family, SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.switching.switch import current_structure, regroup


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023), the smallest form: one moment per weight."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * moment + 0.1 * p.grad).sign())
                moment.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "lion": lambda p: Lion(p, lr=1e-3),
}


def structures(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        current_structure(layer)[torch.randperm(layer.ssd.d_ff, generator=generator)]
        for layer in layers_of(model)
    ]


def gradients(model: nn.Module, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_regrouping_changes_no_logits_and_puts_experts_together(
    switchable_gpt2: nn.Module, tokens: Tensor
) -> None:
    before = switchable_gpt2(input_ids=tokens).logits
    layer = layers_of(switchable_gpt2)[0]
    rows = layer.ssd.weights.up_FD.detach().clone()
    wanted = structures(switchable_gpt2)
    perms = regroup(layers_of(switchable_gpt2), wanted)
    after = switchable_gpt2(input_ids=tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert perms[0] is not None
    assert torch.equal(layer.ssd.weights.up_FD, rows[perms[0]])
    together = wanted[0][perms[0]].view(8, 8)
    assert torch.equal(together, together[:, :1].expand(8, 8))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_then_permute_equals_permute_then_step_exactly(
    switchable_gpt2: nn.Module, tokens: Tensor, name: str
) -> None:
    model = switchable_gpt2
    optimizer = OPTIMIZERS[name](model.parameters())
    gradients(model, tokens)
    optimizer.step()  # moments are there from here on; gradients stay for the next step
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    other_optimizer = OPTIMIZERS[name](other.parameters())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wanted = structures(model)

    optimizer.step()
    regroup(layers_of(model), wanted, [optimizer])
    regroup(layers_of(other), wanted, [other_optimizer])
    other_optimizer.step()

    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), key
        for state, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_optimizer.state[q][state])), (
                key,
                state,
            )


def test_an_unchanged_structure_moves_nothing(switchable_gpt2: nn.Module) -> None:
    same = [current_structure(layer) for layer in layers_of(switchable_gpt2)]
    renamed = [(labels + 3) % 8 for labels in same]  # the same groups under other numbers
    assert regroup(layers_of(switchable_gpt2), renamed) == [None, None]


def test_linear_layers_move_too() -> None:
    model = HomeMade()
    convert(
        model, SwitchConfig(num_experts=4, experts_per_token=2), Family(ffn="MyMLP", up="fc1", down="fc2")
    )
    x = torch.randn(5, 6)
    before = model(x)
    wanted = [torch.arange(24) % 4 for _ in range(3)]
    assert all(perm is not None for perm in regroup(layers_of(model), wanted))
    torch.testing.assert_close(model(x), before)
