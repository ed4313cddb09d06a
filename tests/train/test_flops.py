"""FLOPs against the formula worked out by hand for a GPT-2."""

from __future__ import annotations

from torch import Tensor, nn

from switchable.ffn.convert import layers_of, set_mode
from switchable.train.flops import count

T, S, D, F, V, L, E, K = 4 * 24, 24, 16, 64, 61, 2, 8, 3


def test_a_step_by_hand(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    for layer in layers_of(switchable_gpt2):
        layer.router_token_fraction = 0.5
    set_mode(switchable_gpt2, "sparse")
    flops = count(switchable_gpt2, {"input_ids": tokens, "labels": tokens})
    attention = 2 * S * D * 2  # scores and weighted sum, per token, over all S positions
    forward = L * (2 * D * 3 * D + 2 * D * D + attention + 4 * D * F) + 2 * D * V
    assert flops.dense == 3 * T * forward
    assert flops.head == 3 * T * 2 * D * V
    sparse_ffn = 3 * 4 * D * F * K / E + 4 * D * E
    learning = 0.5 * (4 * D * E + 2 * F)
    assert flops.step((None, None)) == flops.dense + T * 2 * learning
    assert flops.step((None, K)) == flops.dense + T * (learning - 3 * 4 * D * F + sparse_ffn)
    assert flops.measurement(2 * T) == 2 * T * (forward + L * 2 * D * F)
    assert all(layer.mode == "sparse" and layer.router_learns for layer in layers_of(switchable_gpt2))
    assert all(p.grad is None for p in switchable_gpt2.parameters())


def test_softmax_gates_pass_a_gradient_to_the_input(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    batch = {"input_ids": tokens, "labels": tokens}
    unit = count(switchable_gpt2, batch)
    for layer in layers_of(switchable_gpt2):
        layer.gate = "softmax"
    assert count(switchable_gpt2, batch).step((3, 3)) == unit.step((3, 3)) + T * L * 2 * D * E
