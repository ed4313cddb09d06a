"""What baselines exchange of SSD: a mixture of experts against a loop by hand, gates that are exactly one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchable import SwitchConfig, convert, set_mode
from switchable.compare import baselines
from switchable.compare.baselines import MixtureFFN, PaperFFN, load_balance_loss
from switchable.ffn.convert import layers_of

Make = Callable[..., nn.Module]


def mixture(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A mixture of experts token by token, and its load-balance loss."""
    weights, scores = layer.ssd.weights, nn.functional.linear(x, layer.router.weight, layer.router.bias)
    top, ids = scores.topk(3)
    rows = []
    for t in range(len(x)):
        gates = 3 * top[t].softmax(dim=0)
        y = layer.ssd.down_projection.bias
        for gate, e in zip(gates, ids[t].tolist(), strict=True):
            own = slice(8 * e, 8 * e + 8)
            hidden = torch.relu(weights.up_FD[own] @ x[t] + weights.up_bias_F[own])
            y = y + gate * (hidden @ weights.down_FD[own])
        rows.append(y)
    share = torch.bincount(ids.flatten(), minlength=8) / ids.numel()
    return torch.stack(rows), 8 * (share * scores.softmax(dim=1).mean(dim=0)).sum()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_mixture_of_experts_and_all_its_gradients(
    make_gpt2: Make, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "LOAD_BALANCE", 0.5)
    model = make_gpt2(layers=1, dtype=torch.float64)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3, backend=backend), layer_type=MixtureFFN)
    model.double()  # the router too
    set_mode(model, "sparse")
    layer = layers_of(model)[0].train()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    weigh = torch.randn(40, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, balance = mixture(layer, x)
    names = [name for name, _ in layer.named_parameters()]
    expected = torch.autograd.grad((weigh * y).sum() + 0.5 * balance, [x, *layer.parameters()])
    out = layer(x[None])[0]
    torch.testing.assert_close(out, y)
    found = torch.autograd.grad((weigh * out).sum(), [x, *layer.parameters()])
    for name, a, b in zip(["x", *names], found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_mixture_is_evaluated_with_its_gates(make_gpt2: Make, tokens: int) -> None:
    """One compiled call, which layers take without gradients, knows no gates."""
    model = make_gpt2(layers=1)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3), layer_type=MixtureFFN)
    set_mode(model, "sparse")
    layer = layers_of(model)[0].eval()
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(x[None])[0], mixture(layer, x)[0])


def test_straight_through_gates_change_no_output_and_teach_the_router(
    make_gpt2: Make, tokens: Tensor
) -> None:
    model, plain = make_gpt2(layers=1, dtype=torch.float64), make_gpt2(layers=1, dtype=torch.float64)
    config = SwitchConfig(num_experts=8, experts_per_token=3)
    convert(model, config, layer_type=PaperFFN)
    convert(plain, config)
    grads = []
    for each in (model, plain):
        each.train()
        layers_of(each)[0].ssd.router_learns = False
        set_mode(each, "sparse")
        each(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in each.named_parameters()})
    torch.testing.assert_close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    for name, grad in grads[1].items():
        if "router" in name:
            assert grad is None
            assert float(grads[0][name].abs().max()) > 0
        else:
            torch.testing.assert_close(grads[0][name], grad)


def test_load_balance_loss_by_hand() -> None:
    even = load_balance_loss(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))
    assert float(even) == pytest.approx(1.0)
    scores = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # mean probabilities 3/8, 5/8
    assert float(load_balance_loss(scores, torch.tensor([[1], [0]]))) == pytest.approx(1.0)
    assert float(load_balance_loss(scores, torch.tensor([[1], [1]]))) == pytest.approx(2 * 5 / 8)
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    assert float(load_balance_loss(sure, torch.tensor([[0]]))) == pytest.approx(4.0)
