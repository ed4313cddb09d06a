"""Training in dense mode from the active neurons alone changes nothing but the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.compute.cpu.llvm import this_machine
from switchable.ffn.active_training import LEAST_TOKENS
from switchable.ffn.convert import layers_of, set_mode
from switchable.ffn.ssd import ActiveCount

pytestmark = pytest.mark.skipif(this_machine() is None, reason="no loops for this processor")
BATCH = (24, 24)  # 576 tokens


def model_of(**settings: Any) -> nn.Module:
    model = tiny_gpt2(dtype=torch.float64)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3, router_token_fraction=0.25, **settings))
    return model.train()


def tokens() -> Tensor:
    return torch.randint(0, 61, BATCH, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("l1", [0.0, 0.01])
def test_all_gradients_are_those_of_the_dense_step_the_routers_too(l1: float) -> None:
    plain = gradients(model_of(activation_l1=l1))
    model = model_of(activation_l1=l1)
    for layer in layers_of(model):
        layer.ssd.multiplies_active = True
    found = gradients(model)
    assert found.keys() == plain.keys()
    for name, wanted in plain.items():
        # The routers' shares of the mass are float32 in a plain step.
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-8, msg=name)
    assert all(layer.ssd.active_count.tokens == 576 for layer in layers_of(model))


def test_the_share_is_that_of_the_probe() -> None:
    model = model_of()
    (layer, *_) = layers_of(model)
    layer.ssd.multiplies_active = True
    x_BSD = torch.randn(2, 300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    layer(x_BSD)
    share = layer.ssd.active_count.take(layer.ssd.d_ff)
    assert share == pytest.approx(float((layer.ssd.activations(x_BSD) > 0).double().mean()))
    assert layer.ssd.active_count.take(layer.ssd.d_ff) is None


def test_shares_add_up_until_they_are_taken() -> None:
    seen = ActiveCount(entries=6, tokens=4)
    seen.entries, seen.tokens = seen.entries + 10, seen.tokens + 4
    assert seen.take(d_ff=4) == 16 / (8 * 4)


def test_only_training_on_enough_tokens_looks_for_active_neurons() -> None:
    x_BSD = torch.zeros(1, LEAST_TOKENS, 16, dtype=torch.float64)
    (layer, *_) = layers_of(model_of())
    layer.ssd.multiplies_active = True

    def counted(x: Tensor) -> int:
        layer.ssd.active_count = ActiveCount()
        layer(x)
        return layer.ssd.active_count.tokens

    assert counted(x_BSD) == LEAST_TOKENS
    assert counted(x_BSD[:, 1:]) == 0
    with torch.no_grad():
        assert counted(x_BSD) == 0
    layer.eval()
    assert counted(x_BSD) == 0


def test_sparse_mode_is_not_concerned() -> None:
    model = model_of()
    for layer in layers_of(model):
        layer.ssd.multiplies_active = True
    set_mode(model, "sparse")
    gradients(model)
    assert all(layer.ssd.active_count.tokens == 0 for layer in layers_of(model))
