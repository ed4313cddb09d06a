"""The router: hand-computed mass and loss, and an objective that teaches it to route."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.compute.estimate import expert_mass
from switchable.ffn.attached import attach_loss, penalise, teach
from switchable.ffn.convert import layers_of
from switchable.ffn.router import Router, router_loss, stride


def test_expert_mass_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0, 2.0, -3.0]])
    down = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])  # norms 5, 1, 2, 1
    torch.testing.assert_close(expert_mass(hidden, down, 2), torch.tensor([[5.0, 7.0]]))


def test_training_teaches_a_layers_router_to_pick_what_is_active() -> None:
    model = tiny_gpt2(layers=1)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2))
    (layer,) = layers_of(model)
    nn.init.normal_(layer.router.weight, std=0.1)  # not the good start that it has
    x = torch.randn(64, 4, layer.ssd.d_model)
    with torch.no_grad():
        layer.ssd.up_projection.bias.fill_(-0.3)
        hidden = layer.ssd.activations(x).view(-1, layer.ssd.d_ff)
        mass = expert_mass(hidden, layer.ssd.weights.down_FD, 8)

    def caught() -> float:
        picked = layer.router(x.view(-1, layer.ssd.d_model)).topk(2).indices
        return float((mass.gather(1, picked).sum(1) / mass.sum(1)).nanmean())

    before, optimizer = caught(), torch.optim.AdamW(layer.router.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
    assert caught() > before + 0.05


def test_router_loss_by_hand_and_silent_tokens_count_as_zero() -> None:
    scores = torch.tensor([[0.0, math.log(3.0)], [1.0, -1.0]])  # softmax 1/4, 3/4
    mass = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    expected = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75)) / 2
    assert math.isclose(float(router_loss(scores, mass)), expected, rel_tol=1e-6)


def test_initialisation_is_the_mean_direction_scaled_to_a_neurons_norm() -> None:
    up = torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, -2.0], [0.0, -6.0]])  # norms 3, 5, 2, 6: mean 4
    router = Router(2, 2)
    router.initialise(up)
    torch.testing.assert_close(router.weight.detach(), torch.tensor([[2.0, 2.0], [0.0, -4.0]]))


def test_an_attached_loss_is_minimised_with_the_main_one() -> None:
    y = torch.tensor([2.0], requires_grad=True)
    w = torch.tensor(3.0, requires_grad=True)
    factor = torch.tensor(1.0)
    out = attach_loss(1 * y, w * w, factor)
    factor.data.fill_(0.5)  # what it is in the backward pass counts
    (5.0 * out).sum().backward()
    assert torch.equal(out.detach(), y.detach())
    assert y.grad is not None
    assert w.grad is not None
    assert (float(y.grad), float(w.grad)) == (5.0, 3.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_router_is_taught_the_gradient_of_its_loss_whatever_is_multiplied_in_half(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TD, y_TD = (torch.randn(n, 16, generator=generator).to(dtype) for n in (12, 24))
    mass_TE = torch.rand(12, 8, generator=generator)
    mass_TE[3] = 0.0  # a silent token
    router = Router(16, 8).to(dtype)
    nn.init.normal_(router.weight, generator=generator)
    y_TD.requires_grad_()
    factor = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))

    def gradients(out: Tensor, scale: float) -> tuple[Tensor, ...]:
        factor.data.fill_(scale)
        return torch.autograd.grad(out.sum(), (y_TD, router.weight, router.bias))

    for scale in (0.25, 1024.0):  # a GradScaler's is large, so that small numbers survive in half precision
        true = gradients(attach_loss(1 * y_TD, 0.5 * router_loss(router(x_TD), mass_TE), factor), scale)
        with torch.autocast("cpu", torch.bfloat16):
            taught = teach(1 * y_TD, router(x_TD), mass_TE, factor, 0.5)
        found = gradients(taught, scale)
        for ours, wanted in zip(found, true, strict=True):
            assert ours.dtype == wanted.dtype
            own = {} if dtype in (torch.bfloat16, torch.float16) else {"rtol": 1e-5, "atol": 1e-6 * scale}
            torch.testing.assert_close(ours, wanted, **own)


def test_a_penalty_adds_the_slope_of_the_mean_of_the_sums_to_what_comes_back() -> None:
    hidden = torch.tensor([[[0.0, 2.0, -3.0], [1.0, 0.0, 4.0]]], requires_grad=True)
    factor = torch.tensor(1.0)
    passed = penalise(hidden, 0.1, factor)
    assert torch.equal(passed, hidden)
    factor.data.fill_(2.0)
    (gradient,) = torch.autograd.grad(passed, hidden, torch.full_like(hidden, 5.0), create_graph=True)
    assert torch.equal(gradient, torch.tensor([[[5.0, 5.1, 4.9], [5.1, 5.0, 5.1]]]))  # 2 · 0.1 / 2 tokens


def test_the_penalty_on_activations_by_hand(switchable_gpt2: nn.Module) -> None:
    layer = layers_of(switchable_gpt2)[0].train()
    layer.ssd.router_learns = False
    x_TD = torch.randn(5, layer.ssd.d_model, generator=torch.Generator().manual_seed(0))

    def gradient(l1: float, *extra: Tensor) -> Tensor:
        layer.ssd.activation_l1 = l1
        total = torch.stack([layer(x_TD).sum(), *extra]).sum()
        return torch.autograd.grad(total, layer.ssd.up_projection.weight)[0]

    # The mean over 5 tokens of the sum of |a_i|, times the coefficient.
    penalty = 0.1 * layer.ssd.activations(x_TD).abs().sum() / 5
    torch.testing.assert_close(gradient(0.1), gradient(0.0, penalty))


def test_the_objective_lowers_its_loss_and_lifts_the_mass_caught() -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(64, 16, generator=generator)
    down = torch.randn(64, 16, generator=generator)
    x = torch.randn(512, 16, generator=generator)
    mass = expert_mass(torch.relu(x @ up.T - 3.0), down, 8)
    router = Router(16, 8)
    router.initialise(up)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.03)

    @torch.no_grad()
    def caught() -> float:
        ids = router(x).topk(2).indices
        return float(mass.gather(1, ids).sum() / mass.sum())

    first_loss, first_caught = router_loss(router(x), mass).item(), caught()
    for _ in range(100):
        optimizer.zero_grad()
        router_loss(router(x), mass).backward()
        optimizer.step()
    assert router_loss(router(x), mass).item() < 0.98 * first_loss
    assert caught() > first_caught + 0.02


@pytest.mark.parametrize(
    ("fraction", "step"), [(1.0, 1), (0.5, 2), (1 / 16, 16), (1e-300, 2**31), (5e-324, 2**31)]
)
def test_the_step_that_picks_a_fraction_of_the_tokens(fraction: float, step: int) -> None:
    assert stride(fraction) == step
    assert torch.arange(10)[::step].tolist() == list(range(0, 10, step))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_a_choice_by_products_of_bfloat16_catches_the_same_mass(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down, x = (torch.randn(n, 64, generator=generator).bfloat16().float() for n in (256, 256, 2048))
    mass = expert_mass(torch.relu(x @ up.T - 8.0), down, 32)
    router = Router(64, 32)
    router.initialise(up)
    router.to(torch.bfloat16).to(torch.float32)
    exact = router(x).detach()
    half = copy.deepcopy(router) if autocast else copy.deepcopy(router).bfloat16()

    def scores(learns: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(learns):
            return half(x if autocast else x.bfloat16())

    def caught(by: Tensor) -> float:
        return float(mass.gather(1, by.topk(6).indices).sum() / mass.sum())

    assert scores(learns=True).dtype == scores(learns=False).dtype == torch.float32
    assert torch.equal(scores(learns=True), exact)
    for pairs in (False, True):
        monkeypatch.setattr(half, "has_pairs", pairs)
        assert torch.equal(scores(learns=False), exact) != pairs
        # Experts change places whose scores differ by less than 1 in 256: they catch nearly the same.
        assert abs(caught(scores(learns=False)) - caught(exact)) < 5e-4
