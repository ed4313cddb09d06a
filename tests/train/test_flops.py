"""FLOPs against the formula worked out by hand for a GPT-2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families.models import make
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.compare.baselines import MixtureFFN, PaperFFN
from switchable.ffn.convert import layers_of, set_mode
from switchable.ffn.layer import SPARSE_TOKEN_FRACTION, SwitchableFFN
from switchable.train.flops import count

T, S, D, F, V, L, E, K = 4 * 24, 24, 16, 64, 61, 2, 8, 3


TAUGHT = SPARSE_TOKEN_FRACTION * (
    2 * D * F + 4 * D * E + 2 * F
)  # what teaches a router in a sparse step, per token


def test_a_step_by_hand(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    set_mode(switchable_gpt2, "sparse")
    flops = count(switchable_gpt2, {"input_ids": tokens, "labels": tokens})
    attention = 2 * S * D * 2  # scores and weighted sum, per token, over all S positions
    forward = L * (2 * D * 3 * D + 2 * D * D + attention + 4 * D * F) + 2 * D * V
    assert flops.dense == 3 * T * forward
    assert flops.head == 3 * T * 2 * D * V
    sparse_ffn = 3 * 4 * D * F * K / E + 2 * D * E + TAUGHT
    learning = 0.5 * (4 * D * E + 2 * F)
    assert flops.step((None, None)) == flops.dense + T * 2 * learning
    # By products in 8 bits: the input projection's at half price, and an eighth of the tokens teaches the router.
    chosen = 2 * D * F / 2 + 0.125 * (4 * D * E + 2 * F)
    sparse = flops.dense + T * L * (12 * D * F * (K / E - 1) + chosen)
    assert flops.step((K, K), estimates=True) == pytest.approx(sparse, rel=1e-12)
    assert flops.step((None, K)) == flops.dense + T * (learning - 3 * 4 * D * F + sparse_ffn)
    # The input projection's forward pass in full, of the other five products a quarter.
    active = 2 * D * F + 5 * 2 * D * 0.25 * F
    assert flops.step((None, K), (0.25, None)) == pytest.approx(
        flops.step((None, K)) + T * (active - 3 * 4 * D * F)
    )
    assert flops.measurement(2 * T) == 2 * T * (forward + L * 2 * D * F)
    assert all(layer.ssd.mode == "sparse" and layer.ssd.router_learns for layer in layers_of(switchable_gpt2))
    assert all(p.grad is None for p in switchable_gpt2.parameters())


@pytest.mark.parametrize(("layer_type", "passes"), [(MixtureFFN, 3), (PaperFFN, 2)])
def test_scaled_outputs_take_more_passes_through_the_router(
    make_gpt2: Callable[..., nn.Module], tokens: Tensor, layer_type: type[SwitchableFFN], passes: int
) -> None:
    model = make_gpt2()
    convert(model, SwitchConfig(num_experts=E, experts_per_token=K), layer_type=layer_type)
    flops = count(model, {"input_ids": tokens, "labels": tokens})
    # And no tokens of a sparse step that teach it.
    assert flops.step((K, K)) == flops.dense + T * L * (3 * 4 * D * F * (K / E - 1) + passes * 2 * D * E)


def test_a_gated_ffn_has_three_projections() -> None:
    model = make("llama").train()
    convert(model, SwitchConfig(num_experts=E, experts_per_token=K))
    ids = torch.randint(3, 61, (4, 24))
    flops = count(model, {"input_ids": ids, "labels": ids})
    assert flops.ffn_dense == (T * 3 * 6 * D * F,) * L
    assert flops.expert == (T * 3 * 6 * D * F / E,) * L
    # The gate's forward pass in full, of the other eight products a quarter.
    skipped = flops.step((None,) * L, (None,) * L) - flops.step((None,) * L, (0.25,) + (None,) * (L - 1))
    assert skipped == pytest.approx(T * 0.75 * 8 * 2 * D * F)
    taught = SPARSE_TOKEN_FRACTION * (2 * 2 * D * F + 4 * D * E + 2 * F)
    assert flops.router == (T * (2 * D * E + taught),) * L
    assert flops.estimate == (T * (2 * 2 * D * F / 2 + 0.125 * (4 * D * E + 2 * F)),) * L
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
