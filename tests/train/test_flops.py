"""FLOPs against the formula worked out by hand for a GPT-2."""

from __future__ import annotations

import pytest
import torch
from families.models import make
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.ffn.convert import layers_of, set_mode
from switchable.train.flops import count

T, S, D, F, V, L, E, K = 4 * 24, 24, 16, 64, 61, 2, 8, 3


def test_a_step_by_hand(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    for layer in layers_of(switchable_gpt2):
        layer.ssd.settings.config.router_token_fraction, layer.ssd.router_sparse_fraction = 0.5, 0.0
    set_mode(switchable_gpt2, "sparse")
    flops = count(switchable_gpt2, {"input_ids": tokens, "labels": tokens})
    attention = 2 * S * D * 2  # scores and weighted sum, per token, over all S positions
    forward = L * (2 * D * 3 * D + 2 * D * D + attention + 4 * D * F) + 2 * D * V
    assert flops.dense == 3 * T * forward
    assert flops.head == 3 * T * 2 * D * V
    sparse_ffn = 3 * 4 * D * F * K / E + 2 * D * E
    learning = 0.5 * (4 * D * E + 2 * F)
    assert flops.step((None, None)) == flops.dense + T * 2 * learning
    assert flops.step((None, K)) == flops.dense + T * (learning - 3 * 4 * D * F + sparse_ffn)
    # The input projection's forward pass in full, of the other five products a quarter.
    active = 2 * D * F + 5 * 2 * D * 0.25 * F
    assert flops.step((None, K), (0.25, None)) == pytest.approx(
        flops.step((None, K)) + T * (active - 3 * 4 * D * F)
    )
    assert flops.measurement(2 * T) == 2 * T * (forward + L * 2 * D * F)
    for layer in layers_of(switchable_gpt2):
        layer.ssd.router_gate_gradient = True
    gates = count(switchable_gpt2, {"input_ids": tokens, "labels": tokens})
    assert gates.step((None, K)) == flops.step((None, K)) + T * 2 * D * E
    for layer in layers_of(switchable_gpt2):
        layer.ssd.router_gate_gradient = False
        layer.ssd.router_sparse_fraction = 0.25
    taught = count(switchable_gpt2, {"input_ids": tokens, "labels": tokens})
    assert taught.step((None, K)) == flops.step((None, K)) + T * 0.25 * (2 * D * F + 4 * D * E + 2 * F)
    for layer in layers_of(switchable_gpt2):
        layer.ssd.router_objective = "norm"
    longer = count(switchable_gpt2, {"input_ids": tokens, "labels": tokens})
    assert longer.step((None, None)) == flops.step((None, None)) + T * 2 * 0.5 * 2 * F * (F // E)
    assert all(layer.ssd.mode == "sparse" and layer.ssd.router_learns for layer in layers_of(switchable_gpt2))
    assert all(p.grad is None for p in switchable_gpt2.parameters())


def test_softmax_gates_pass_a_gradient_to_the_input(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    batch = {"input_ids": tokens, "labels": tokens}
    unit = count(switchable_gpt2, batch)
    for layer in layers_of(switchable_gpt2):
        layer.ssd.expert_gate = "softmax"
    # Two more passes through the router, and no tokens of a sparse step that teach it.
    more = 4 * D * E - (2 * D * F + 4 * D * E + 2 * F) / 16
    assert count(switchable_gpt2, batch).step((3, 3)) == unit.step((3, 3)) + T * L * more


def test_commitment_asks_the_router_and_weighs_the_activations_once_more(
    switchable_gpt2: nn.Module, tokens: Tensor
) -> None:
    batch = {"input_ids": tokens, "labels": tokens}
    for layer in layers_of(switchable_gpt2):
        layer.ssd.settings.config.router_token_fraction = 0.5
    without = count(switchable_gpt2, batch)
    for layer in layers_of(switchable_gpt2):
        layer.ssd.commitment = 0.1
    more = T * L * 0.5 * (2 * D * E + 2 * 2 * F)
    assert count(switchable_gpt2, batch).step((None, None)) == without.step((None, None)) + more


def test_a_gated_ffn_has_three_projections() -> None:
    model = make("llama").train()
    config = SwitchConfig(
        num_experts=E, experts_per_token=K, router_token_fraction=1.0, router_sparse_fraction=0.5
    )
    convert(model, config)
    ids = torch.randint(3, 61, (4, 24))
    flops = count(model, {"input_ids": ids, "labels": ids})
    assert flops.ffn_dense == (T * 3 * 6 * D * F,) * L
    assert flops.expert == (T * 3 * 6 * D * F / E,) * L
    assert flops.router == (T * (2 * D * E + 0.5 * (2 * 2 * D * F + 4 * D * E + 2 * F)),) * L
    assert flops.measurement(T) * 3 == pytest.approx(flops.dense + L * T * 3 * 4 * D * F)
    heads = 2 * 2 * D * D + 2 * 2 * D * (D // 2)  # q and output; k and v of one head of two
    forward = L * (heads + 2 * S * D * 2 + 6 * D * F) + 2 * D * V
    assert flops.dense == 3 * T * forward


def test_both_sides_of_a_model_count_their_own_tokens() -> None:
    model = make("t5").train()
    convert(model, SwitchConfig(num_experts=E, experts_per_token=K))
    flops = count(model, {"input_ids": torch.ones(2, 12).long(), "labels": torch.ones(2, 7).long()})
    assert flops.ffn_dense == (24 * 3 * 4 * D * F,) * 2 + (14 * 3 * 4 * D * F,) * 3
    assert flops.head == 14 * 6 * D * V
