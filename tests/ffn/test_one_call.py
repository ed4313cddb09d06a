"""Layers that decode in one call: what was looked up serves the next call, and no change in between is missed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from compute.machines import needs_instructions
from support import Holder, relative_error
from torch import Tensor
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.compute.cpu.decode.compiled import prepare_call
from switchable.compute.cpu.experts.fused import prepare_prefill
from switchable.compute.cpu.limits import has_pairs
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN

pytestmark = needs_instructions
LOOPS_FOR_HALF = "Prefill" if has_pairs() else "NoneType"


def model_of_one_layer(kind: str = "gpt2", d_model: int = 64) -> torch.nn.Module:
    from switchable.ffn.builders import build_model

    torch.manual_seed(0)
    sizes = {"d_model": d_model, "d_ff": 256, "num_layers": 1, "num_heads": 2, "max_positions": 8}
    model = build_model(kind, sizes, "relu", 50, {"eos_token_id": 0}).eval()
    convert(model, SwitchConfig(num_experts=16, experts_per_token=4))
    set_mode(model, "sparse")
    bias = layers_of(model)[0].ssd.down_projection.bias
    if bias is not None:  # a Llama's has none
        torch.nn.init.normal_(bias)
    return model


def assert_right(layer: SwitchableFFN, x_BSD: Tensor) -> None:
    """The layer's output is the reference's."""
    with torch.no_grad():
        ours = layer(x_BSD)
        settings = layer.ssd.settings
        layer.ssd.settings = replace(settings, config=replace(settings.config, backend="reference"))
        reference = layer(x_BSD)
        layer.ssd.settings = settings
    torch.testing.assert_close(ours, reference)


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each attempt to prepare a call came to."""
    found: list[str] = []

    def watched(prepare: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        call = prepare(*args, **kwargs)
        found.append(type(call).__name__)
        return call

    for prepare in (prepare_call, prepare_prefill):
        monkeypatch.setattr(f"switchable.ffn.one_call.{prepare.__name__}", partial(watched, prepare))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 5, 32, 33, 301])
def test_a_layer_in_sparse_mode_takes_it(kind: str, tokens: int, preparations: list[str]) -> None:
    layer = layers_of(model_of_one_layer(kind))[0]
    assert_right(layer, torch.randn(1, tokens, 64))
    assert preparations == ["DecodeCall" if tokens <= 32 else "Prefill"]


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_16_bits_are_taken_too(router: torch.dtype, tokens: int, preparations: list[str]) -> None:
    """Those of a router are float32 where a model of bfloat16 was converted, and not where all of it was cast later."""
    layer = layers_of(model_of_one_layer())[0].bfloat16()
    layer.router.to(router)
    x_BSD = torch.randn(1, tokens, 64).bfloat16()
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight.bfloat16())  # for many tokens it is rounded in any case
        ours, exact = layer(x_BSD), copy.deepcopy(layer).double()(x_BSD.double())
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 4e-3
    assert preparations == (["DecodeCall"] if tokens == 3 else [LOOPS_FOR_HALF])


def test_strided_tokens_are_taken_too(preparations: list[str]) -> None:
    layer = layers_of(model_of_one_layer())[0]
    assert_right(layer, torch.randn(5, 2, 64).transpose(0, 1))
    assert_right(layer, torch.randn(25, 2, 64).transpose(0, 1))
    assert preparations == ["DecodeCall", "Prefill"]


def test_what_was_looked_up_serves_the_next_call(preparations: list[str]) -> None:
    layer = layers_of(model_of_one_layer())[0]
    for tokens in (20, 21, 22):
        assert_right(layer, torch.randn(2, 3, 64))
        assert_right(layer, torch.randn(2, tokens, 64))
    assert preparations == ["DecodeCall", "Prefill"]


@pytest.mark.parametrize("tokens", [3, 40, 100])
def test_a_quantised_router_is_left_to_torch(tokens: int) -> None:
    layer = layers_of(model_of_one_layer())[0]
    x_BSD = torch.randn(1, tokens, 64)
    with torch.no_grad():
        want = layer(x_BSD)
        layer.router.weight = torch.nn.Parameter(Holder(layer.router.weight.detach()))
        torch.testing.assert_close(layer(x_BSD), want)
    torch.testing.assert_close(layer(x_BSD), want)  # as in training


@pytest.mark.parametrize("part", ["up_projection", "down_projection"])
def test_projections_quantised_after_convert_have_no_sparse_mode(part: str) -> None:
    model = model_of_one_layer()
    layer = layers_of(model)[0]
    module = getattr(layer.ssd, part)
    module.weight = torch.nn.Parameter(Holder(module.weight.detach()))
    refusal = r"mlp\.c_\w+ has been quantised \(Holder\), and sparse mode reads rows of the weight"
    for tokens in (3, 40, 100):
        with torch.no_grad(), pytest.raises(InputError, match=refusal):
            layer(torch.randn(1, tokens, 64))
    with pytest.raises(InputError, match=refusal):
        set_mode(model, "sparse")
    set_mode(model, "dense")


def test_where_there_is_no_code_the_layer_goes_step_by_step(preparations: list[str]) -> None:
    layer = layers_of(model_of_one_layer(d_model=18))[0]  # no whole vectors on any machine
    for tokens in (3, 40):
        assert_right(layer, torch.randn(1, tokens, 18))
    assert preparations == ["NoneType", "NoneType"]


CHANGES: dict[str, Callable[[SwitchableFFN], object]] = {
    "other numbers in the same place": lambda layer: layer.ssd.up_projection.weight.data.mul_(-1),
    "a weight elsewhere": lambda layer: setattr(
        layer.ssd.up_projection.weight, "data", -layer.ssd.up_projection.weight.data
    ),
    "another parameter": lambda layer: setattr(
        layer.ssd.down_projection, "bias", torch.nn.Parameter(torch.randn(64))
    ),
    "no bias": lambda layer: setattr(layer.ssd.up_projection, "bias", None),
    "another projection": lambda layer: setattr(layer, layer.ssd.settings.family.up, Conv1D(256, 64)),
    "another router": lambda layer: setattr(
        layer.router, "weight", torch.nn.Parameter(torch.randn_like(layer.router.weight))
    ),
    "more experts": lambda layer: layer.ssd.set_experts_per_token(9),
    "another order in memory": lambda layer: setattr(
        layer.ssd.up_projection.weight, "data", layer.ssd.up_projection.weight.data.contiguous()
    ),
    "a parametrization": lambda layer: parametrize.register_parametrization(
        layer.ssd.down_projection, "weight", torch.nn.Dropout(0.0)
    ),
    "double precision": lambda layer: layer.double(),
}
GATE_CHANGES: dict[str, Callable[[SwitchableFFN], object]] = {
    "other numbers in the gate": lambda layer: layer.ssd.gate_projection.weight.data.mul_(-1),
    "a gate elsewhere": lambda layer: setattr(
        layer.ssd.gate_projection.weight, "data", -layer.ssd.gate_projection.weight.data
    ),
    "another gate": lambda layer: setattr(
        layer, layer.ssd.settings.family.gate, torch.nn.Linear(64, 256, bias=False)
    ),
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("gpt2", change) for change in CHANGES.values()),
        *(("llama", change) for change in GATE_CHANGES.values()),
    ],
    ids=[*CHANGES, *GATE_CHANGES],
)
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_change_between_two_calls_is_noticed(
    kind: str, change: Callable[[SwitchableFFN], object], tokens: int, preparations: list[str]
) -> None:
    layer = layers_of(model_of_one_layer(kind))[0]
    assert_right(layer, torch.randn(1, tokens, 64))
    assert preparations == ["DecodeCall" if tokens == 3 else "Prefill"]
    with torch.no_grad():
        change(layer)
    assert_right(layer, torch.randn(1, tokens, 64, dtype=layer.ssd.up_projection.weight.dtype))


def test_a_projection_exchanged_within_its_own_module_is_noticed(preparations: list[str]) -> None:
    """Where BERT's layer holds the projections, each two modules deep."""
    layer = layers_of(model_of_one_layer("bert"))[0]
    assert_right(layer, torch.randn(1, 3, 64))
    assert preparations == ["DecodeCall"]
    path, _, name = layer.ssd.settings.family.up.rpartition(".")
    new = copy.deepcopy(layer.ssd.up_projection)
    torch.nn.init.normal_(new.weight)
    setattr(layer.ssd.holders[-1].get_submodule(path), name, new)
    assert_right(layer, torch.randn(1, 3, 64))


def test_dropout_behind_the_layer_is_left_to_those_who_train() -> None:
    layer = layers_of(model_of_one_layer())[0]
    dropout = layer.get_submodule(layer.ssd.settings.family.dropout or "")
    dropout.p = 0.5
    x_BSD = torch.randn(1, 3, 64)
    with torch.no_grad():
        assert (layer(x_BSD) != 0).all()
        dropout.train()  # as for Monte Carlo estimates of a model's uncertainty
        assert 0 < (layer(x_BSD) == 0).sum() < x_BSD.numel()


def test_copies_of_a_layer_look_up_their_own() -> None:
    layer = layers_of(model_of_one_layer())[0]
    assert_right(layer, torch.randn(1, 3, 64))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            twin.ssd.up_projection.weight.mul_(2)
        assert_right(twin, torch.randn(1, 3, 64))
    assert_right(layer, torch.randn(1, 3, 64))


@pytest.mark.parametrize("tokens", [3, 40])
def test_several_python_threads_share_a_layer(tokens: int) -> None:
    layer = layers_of(model_of_one_layer())[0]
    inputs = torch.randn(8, 200, 1, tokens, 64)
    with torch.no_grad():
        true = [[layer(x) for x in own] for own in inputs]

    @torch.no_grad()
    def serve(own: Tensor) -> list[Tensor]:
        return [layer(x) for x in own]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(serve, inputs))
    assert all(
        torch.equal(a, b)
        for ours, own in zip(found, true, strict=True)
        for a, b in zip(ours, own, strict=True)
    )
