"""Calibration: routers learn to catch the mass; shares and losses are those counted by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from adapt.checkpoints import ids_for, sparse_ffns
from families.models import make
from torch import Tensor, nn

from switchable import SwitchConfig, convert, set_mode
from switchable.adapt.calibrate import calibrate
from switchable.adapt.table import LayerRow, Losses, as_text, layer_rows, losses
from switchable.ffn.convert import is_router_parameter, layers_of


def test_calibration_trains_the_routers_and_nothing_else() -> None:
    model = sparse_ffns(make("gpt2"))
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2))
    set_mode(model, "sparse", 3)
    for layer in layers_of(model):
        nn.init.zeros_(layer.router.weight)
    batches = [
        {"input_ids": torch.randint(3, 61, (8, 32), generator=torch.Generator().manual_seed(i))}
        for i in range(16)
    ]
    before = {n: t.clone() for n, t in model.named_parameters()}
    caught = [row.mass_caught for row in layer_rows(model, batches)]
    seen: list[int] = []
    calibrate(model, batches, 3e-2, advance=seen.append)
    assert seen == [1] * 16 + [16] * 4  # shown, then four epochs
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) != is_router_parameter(name), name
    assert all(
        now.mass_caught > max(then + 0.05, 0.97 * now.mass_best)
        for now, then in zip(layer_rows(model, batches), caught, strict=True)
    )
    assert [(layer.ssd.mode, layer.ssd.experts_per_token) for layer in layers_of(model)] == [
        ("sparse", 3)
    ] * 2
    assert not model.training
    assert all(p.grad is None for n, p in model.named_parameters() if not is_router_parameter(n))


def test_the_figures_by_hand() -> None:
    model = sparse_ffns(make("gpt2"))
    convert(model, SwitchConfig(num_experts=4, experts_per_token=1))
    layer = layers_of(model)[1]
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    rows: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, args: rows.append(args[0][0]))
    model(**batch)
    hook.remove()
    active, caught, best, mass = 0, 0.0, 0.0, 0.0
    weights = layer.ssd.weights
    up_FD, bias_F, down_FD = weights.up_FD.detach(), weights.up_bias_F.detach(), weights.down_FD.detach()
    for x in rows[0].detach():
        hidden = [max(0.0, float(w @ x + b)) for w, b in zip(up_FD, bias_F, strict=True)]
        masses = [hidden[i] * float(down_FD[i].norm()) for i in range(64)]
        experts = [sum(masses[16 * e : 16 * e + 16]) for e in range(4)]
        active += sum(h > 0 for h in hidden)
        caught += experts[int(layer.router(x[None]).argmax())]
        best += max(experts)
        mass += sum(experts)
    row = layer_rows(model, [batch])[1]
    assert row.activation_ratio == active / (3 * 64)
    assert row.mass_caught == pytest.approx(caught / mass, rel=1e-5)
    assert row.mass_best == pytest.approx(best / mass, rel=1e-5)


def test_losses_are_taken_at_an_eighth_a_quarter_and_half_of_the_experts() -> None:
    model = sparse_ffns(make("gpt2"))
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    validation = [ids_for(model)]
    found = losses(model, validation)
    twin = copy.deepcopy(model)
    for name, k in (("1/8", 1), ("1/4", 2), ("1/2", 4)):
        set_mode(twin, "sparse", k)
        assert found.sparse[name] == pytest.approx(twin(**validation[0]).loss.item(), rel=1e-6)
    set_mode(twin, "dense")
    assert found.dense == pytest.approx(twin(**validation[0]).loss.item(), rel=1e-6)
    assert layers_of(model)[0].ssd.experts_per_token == 3


def test_the_table() -> None:
    rows = [LayerRow("h.0.mlp", 16, 0.39, 0.64, 0.65, False), LayerRow("h.1.mlp", 8, 0.06, 0.95, 0.96, True)]
    text = as_text(rows, Losses(2.0, {"1/8": 2.1, "1/4": 2.02}), 32)
    assert text.splitlines() == [
        "FFN      active  K of 32    caught  best choice  sparse mode",
        "h.0.mlp   0.390         16   0.640        0.650  stays dense",
        "h.1.mlp   0.060          8   0.950        0.960  sparse",
        "loss, nats per token: dense 2.0000; K/E = 1/8 2.1000 (+5.0 %), K/E = 1/4 2.0200 (+1.0 %)",
    ]
