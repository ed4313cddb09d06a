"""The router: gates that are exactly one, hand-computed mass and loss, and an objective that teaches it to route."""

from __future__ import annotations

import math

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.ffn.router import (
    Router,
    attach_loss,
    expert_mass,
    expert_norm,
    load_balance_loss,
    ranked_first,
    router_loss,
    select,
    share_missed,
    softmax_gates,
)


def test_gates_are_exactly_one_and_their_gradient_is_the_softmaxs() -> None:
    scores = torch.tensor([[0.3, 2.0, -1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    ids, gates = select(scores, 2)
    assert set(ids[0].tolist()) == {1, 3}
    assert torch.equal(gates, torch.ones_like(gates))
    gates[0, ids[0].tolist().index(1)].backward()
    p = math.exp(2) / (math.exp(2) + math.exp(1))
    expected = torch.tensor([[0.0, p * (1 - p), 0.0, -p * (1 - p)]], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, expected)


def test_noisy_choices_are_drawn_by_their_probabilities_and_gates_stay_one() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    scores = probabilities.log().expand(20_000, 4).clone().requires_grad_()
    torch.manual_seed(0)
    ids, gates = select(scores, 1, noise=1.0)
    found = torch.bincount(ids.flatten(), minlength=4) / len(ids)
    torch.testing.assert_close(found, probabilities, atol=0.01, rtol=0)
    assert gates is not None
    assert torch.equal(gates, torch.ones_like(gates))
    # Two of them without replacement: 0.1 first, or second after any other.
    ids, _ = select(scores, 2, noise=1.0)
    expected = 0.1 + sum(p * 0.1 / (1 - p) for p in (0.5, 0.25, 0.15))
    assert float((ids == 3).any(dim=1).float().mean()) == pytest.approx(expected, abs=0.01)
    assert select(scores.detach(), 2, noise=0.0)[0].sort().values.unique(dim=0).tolist() == [[0, 1]]


def test_softmax_gates_by_hand() -> None:
    ids, gates = softmax_gates(torch.tensor([[0.0, math.log(3.0), -9.0]]), 2)  # softmax over two: 1/4, 3/4
    by_expert = dict(zip(ids[0].tolist(), gates[0].tolist(), strict=True))
    assert by_expert == {0: pytest.approx(0.5), 1: pytest.approx(1.5)}


def test_load_balance_loss_by_hand() -> None:
    even = load_balance_loss(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))
    assert float(even) == pytest.approx(1.0)
    scores = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # mean probabilities 3/8, 5/8
    assert float(load_balance_loss(scores, torch.tensor([[1], [0]]))) == pytest.approx(1.0)
    assert float(load_balance_loss(scores, torch.tensor([[1], [1]]))) == pytest.approx(2 * 5 / 8)
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    assert float(load_balance_loss(sure, torch.tensor([[0]]))) == pytest.approx(4.0)


def test_expert_mass_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0, 2.0, -3.0]])
    down = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])  # norms 5, 1, 2, 1
    torch.testing.assert_close(expert_mass(hidden, down, 2), torch.tensor([[5.0, 7.0]]))


def test_expert_norm_by_hand_and_against_the_outputs_themselves() -> None:
    hidden = torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    down = torch.tensor(
        [[3.0, 0.0], [0.0, 2.0], [7.0, 7.0], [0.0, 1.0]]
    )  # expert 0 writes (3, 4), expert 1 (0, 3)
    torch.testing.assert_close(expert_norm(hidden, down, 2), torch.tensor([[5.0, 3.0]]))
    hidden, down = torch.rand(7, 12), torch.randn(12, 5)
    written_TED = torch.einsum("tei,eid->ted", hidden.view(7, 3, 4), down.view(3, 4, 5))
    torch.testing.assert_close(expert_norm(hidden, down, 3), written_TED.norm(dim=-1))


def test_ranked_first_by_hand() -> None:
    mass = torch.tensor([[0.5, 3.0, 2.0, 1.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert ranked_first(mass, 2).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("objective", ["mass", "norm", "ranking"])
def test_every_objective_teaches_a_layer_to_pick_what_is_active(objective: str) -> None:
    model = tiny_gpt2(layers=1)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2, router_objective=objective))
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
    out = attach_loss(y, w * w)
    (5.0 * out).sum().backward()
    assert torch.equal(out.detach(), y.detach())
    assert y.grad is not None
    assert w.grad is not None
    assert (float(y.grad), float(w.grad)) == (5.0, 6.0)


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


def test_the_share_missed_by_hand() -> None:
    mass = torch.tensor([[1.0, 3.0, 4.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]], requires_grad=True)
    missed = share_missed(mass, torch.tensor([[1, 2], [0, 1], [1, 2]]))
    assert float(missed.detach()) == pytest.approx((1 / 8 + 0 + 1) / 3)
    (gradient,) = torch.autograd.grad(missed, mass)
    # d(1 - caught / total): 7 / 64 for what is missed, -1 / 64 for what is caught; a silent token has no slope.
    torch.testing.assert_close(gradient[0], torch.tensor([7.0, -1.0, -1.0]) / 64 / 3)
    assert gradient[1].isfinite().all()


def test_commitment_makes_neurons_fire_where_their_expert_is_chosen() -> None:
    model = tiny_gpt2(layers=1)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=2, commitment=1.0))
    (layer,) = layers_of(model)
    layer.router.requires_grad_(False)
    x = torch.randn(64, 4, layer.ssd.d_model, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def caught() -> float:
        x_TD = x.view(-1, layer.ssd.d_model)
        mass = expert_mass(layer.ssd.activations(x_TD), layer.ssd.weights.down_FD, 8)
        picked = layer.router(x_TD).topk(2).indices
        return float((mass.gather(1, picked).sum(1) / mass.sum(1)).nanmean())

    def train(steps: int) -> None:
        optimizer = torch.optim.AdamW([layer.ssd.up_projection.weight], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.0 * layer(x).sum()).backward()
            optimizer.step()

    start = caught()
    layer.ssd.takes_part = False
    train(3)
    assert caught() == pytest.approx(start, abs=0.02)  # weight decay alone
    layer.ssd.takes_part = True
    train(60)
    assert caught() > start + 0.2


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
        ids, _ = select(router(x), 2)
        return float(mass.gather(1, ids).sum() / mass.sum())

    first_loss, first_caught = router_loss(router(x), mass).item(), caught()
    for _ in range(100):
        optimizer.zero_grad()
        router_loss(router(x), mass).backward()
        optimizer.step()
    assert router_loss(router(x), mass).item() < 0.98 * first_loss
    assert caught() > first_caught + 0.02
