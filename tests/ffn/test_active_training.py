"""Training in dense mode from the active neurons alone changes nothing but the time."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from switchable import Family, SwitchConfig, convert
from switchable.compute.cpu.active import active as active_module
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


FFNS = {
    "plain": (
        lambda: GPT2MLP(256, GPT2Config(n_embd=64, activation_function="relu", resid_pdrop=0.0)),
        Family(ffn="GPT2MLP", up="c_fc", down="c_proj"),
    ),
    "gated": (
        lambda: LlamaMLP(
            LlamaConfig(hidden_size=64, intermediate_size=256, hidden_act="relu", mlp_bias=True)
        ),
        Family(ffn="LlamaMLP", up="up_proj", down="down_proj", gate="gate_proj", activation="act_fn"),
    ),
}
"""One FFN, and how it is described."""


def layer_of(kind: str) -> nn.Module:
    """A converted FFN whose numbers are bfloat16's, in training."""
    make, family = FFNS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3, router_token_fraction=1.0), family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name.endswith("bias") else 0.125
            parameter.copy_(parameter.normal_(std=scale).bfloat16())
    return model.train()


def trained(
    model: nn.Module, dtype: torch.dtype, *, active: bool, autocast: bool = False
) -> dict[str, Tensor]:
    """The output and all gradients of a copy, for numbers that bfloat16 has."""
    model = copy.deepcopy(model).to(dtype)
    (layer,) = layers_of(model)
    layer.ssd.multiplies_active = active
    generator = torch.Generator().manual_seed(5)
    x_BSD, dy_BSD = (torch.randn(3, 201, 64, generator=generator).bfloat16().to(dtype) for _ in range(2))
    x_BSD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y_BSD = model(x_BSD)
    y_BSD.backward(dy_BSD.to(y_BSD.dtype))
    assert x_BSD.grad is not None
    assert layer.ssd.active_count.tokens == (603 if active else 0)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y_BSD.detach(), "x": x_BSD.grad, **grads}


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("kind", FFNS)
def test_in_bfloat16_a_layer_is_as_exact_as_dense_and_its_router_learns_the_same(
    kind: str, autocast: bool
) -> None:
    machine = this_machine()
    if machine is None or not machine.pairs:
        pytest.skip("a processor that multiplies no pairs of bfloat16")
    dtype = torch.float32 if autocast else torch.bfloat16
    model = layer_of(kind)
    true = trained(model, torch.float64, active=False)
    dense, ours = (trained(model, dtype, active=active, autocast=autocast) for active in (False, True))
    assert true.keys() == dense.keys() == ours.keys()
    for name, wanted in true.items():
        off, most = (float((found[name].double() - wanted).norm()) for found in (ours, dense))
        assert off <= 1.5 * most, name


def test_without_an_instruction_for_it_bfloat16_multiplies_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = layer_of("plain")
    dense = trained(model, torch.bfloat16, active=False)
    here = this_machine()
    assert here is not None
    monkeypatch.setattr(active_module, "this_machine", lambda: replace(here, pairs=False))
    (layer,) = layers_of(model)
    layer.ssd.multiplies_active = True
    x_BSD = torch.randn(3, 201, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    y_BSD = model.bfloat16()(x_BSD)
    assert layer.ssd.active_count.tokens == 0
    assert torch.equal(y_BSD, dense["y"])


@pytest.mark.parametrize(("ratio", "half", "whole"), [(0.19, True, True), (0.2, False, True)])
def test_from_a_fifth_of_the_neurons_on_bfloat16_multiplies_all_whatever_the_settings_say(
    ratio: float, half: bool, whole: bool
) -> None:
    machine = this_machine()
    if machine is None or not machine.pairs:
        pytest.skip("a processor that multiplies no pairs of bfloat16")
    model = layer_of("plain")
    ssd = layers_of(model)[0].ssd
    ssd.multiplies_active, ssd.activation_ratio = True, ratio
    x_BSD = torch.randn(3, 201, 64)

    def skips(weights: torch.dtype, *, autocast: bool = False) -> bool:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.to(weights)(x_BSD.to(weights))
        return ssd.active_count.take(ssd.d_ff) is not None

    assert skips(torch.float32) == whole
    assert skips(torch.float32, autocast=True) == half
    assert skips(torch.bfloat16) == half
