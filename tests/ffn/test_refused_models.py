"""What hangs on a model before it is converted, and what is no FFN: refused, and not a bit of the model has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from families.models import BASE, LLAMA, inputs, make, output
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune
from transformers import BitNetConfig, BitNetForCausalLM, MixtralConfig, MixtralForCausalLM

from switchable import Family, InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.switching.switch import regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)
PROJECTIONS = {  # up and down, by model: an FFN's own module, parts of a layer, gated
    "opt": ("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
    "phi": ("model.layers.1.mlp.fc1", "model.layers.1.mlp.fc2"),
    "llama": ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
}
Change = Callable[[nn.Module, str], object]


class Scaled(nn.Linear):
    """A linear layer that is more than its weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Casting(nn.Linear):
    """A linear layer that multiplies in its input's precision, and is its weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nnf.linear(x, self.weight.to(x.dtype), bias)


class LoRA(nn.Linear):
    """An adapter as a library writes one: it is a linear layer, and a product of two narrow ones besides."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up = (
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) + self.up(self.down(x))
        return y


class Int8(Tensor):
    """A tensor that is not the numbers it holds, as quantised weights are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nnf.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            plain = weight.as_subclass(Tensor)
            scale = plain.detach().abs().max() / 127
            return nnf.linear(x, (plain / scale).round() * scale, bias)
        if "norm" in func.__name__:
            raise NotImplementedError("as torchao's")
        return super().__torch_function__(func, types, args, kwargs)


def as_class(kind: type[nn.Linear]) -> Change:
    def change(model: nn.Module, path: str) -> None:
        model.get_submodule(path).__class__ = kind

    return change


def quantise(model: nn.Module, path: str) -> None:
    projection = model.get_submodule(path)
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Int8))


HANGING: dict[str, Change] = {
    "spectral norm": lambda m, path: parametrizations.spectral_norm(m.get_submodule(path)),
    "weight norm": lambda m, path: parametrizations.weight_norm(m.get_submodule(path)),
    "a mask": lambda m, path: prune.l1_unstructured(m.get_submodule(path), "weight", 0.5),
    "an adapter": lambda m, path: m.set_submodule(path, LoRA(m.get_submodule(path))),
    "a factor": as_class(Scaled),
    "quantised": quantise,
    "a hook": lambda m, path: m.get_submodule(path).register_forward_hook(lambda _m, _x, y: y + 1),
    "a pre-hook": lambda m, path: m.get_submodule(path).register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
}


def check_refused(
    model: nn.Module,
    see: Callable[[], Tensor],
    family: Family | None = None,
    says: str = ".",
    learns: bool = True,
) -> None:
    """Whatever an optimizer and a reader know of the model is as it was; in training, too."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if learns:
        see().square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    before = see().detach()
    model.train()
    weights = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    moments = [t.clone() for t in moments_of(optimizer)]
    modules = [(n, type(m)) for n, m in model.named_modules()]
    known = [id(p) for p in model.parameters()]
    with pytest.raises(InputError, match=says):
        convert(model, CONFIG, family)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert [id(p) for p in model.parameters()] == known
    assert all(torch.equal(model.state_dict()[n], t) for n, t in weights.items())
    assert all(torch.equal(t, kept) for t, kept in zip(moments_of(optimizer), moments, strict=True))
    assert all(m.training for m in model.modules())
    model.eval()
    assert torch.equal(see(), before)


def moments_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


@pytest.mark.parametrize("row", ["with a row", "by structure"])
@pytest.mark.parametrize("which", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize("case", PROJECTIONS)
@pytest.mark.parametrize("what", HANGING)
def test_what_hangs_on_a_projection(case: str, which: int, what: str, row: str) -> None:
    model, batch = make(case), inputs(case)
    HANGING[what](model, PROJECTIONS[case][which])
    if row == "by structure":
        model.config.model_type = "unknown"
    check_refused(model, lambda: output(model, batch))


def test_weights_that_torch_has_quantised() -> None:
    model, batch = make("opt"), inputs("opt")
    path = PROJECTIONS["opt"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it moves
        quantize_dynamic(model, {path}, inplace=True)
    assert "quantized" in type(model.get_submodule(path)).__module__
    says = r"layers\.1\.fc1 is quantised; load the model unquantised"
    check_refused(model, lambda: output(model, batch), says=says, learns=False)


def test_a_mixture_of_experts() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, hidden_act="relu")).eval()
    batch = inputs("llama")
    check_refused(model, lambda: model(**batch).logits, says="mixture of experts")


def test_a_norm_between_activation_and_output_projection() -> None:
    settings = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BitNetForCausalLM(BitNetConfig(num_key_value_heads=1, **BASE, **settings)).eval()
    batch = inputs("llama")
    check_refused(model, lambda: model(**batch).logits)
    family = Family("BitNetMLP", gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn")
    for described in (family, replace(family, in_layer=True)):
        check_refused(model, lambda: model(**batch).logits, described, "something else|does not describe")


@pytest.mark.parametrize("in_layer", [False, True])
def test_gate_and_up_the_wrong_way_round(in_layer: bool) -> None:
    model, batch = make("llama"), inputs("llama")
    right = Family(
        "LlamaMLP", gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn", in_layer=in_layer
    )
    wrong = replace(right, gate="up_proj", up="gate_proj")
    check_refused(model, lambda: output(model, batch), wrong, "something else|does not describe")
    before = output(model, batch)
    convert(model, CONFIG, right)
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("row", ["with a row", "by structure"])
@pytest.mark.parametrize("which", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize("case", PROJECTIONS)
def test_a_subclass_that_is_its_weight_and_bias_works(case: str, which: int, row: str) -> None:
    model, batch = make(case), inputs(case)
    as_class(Casting)(model, PROJECTIONS[case][which])
    if row == "by structure":
        model.config.model_type = "unknown"
    before = output(model, batch)
    convert(model, CONFIG)
    assert torch.equal(output(model, batch), before)
    set_mode(model, "sparse", experts_per_token=8)
    torch.testing.assert_close(output(model, batch), before)
    labels_F = torch.arange(64) % 8
    perms = regroup(layers_of(model), [labels_F, labels_F], [])
    assert all(perm is not None for perm in perms)
    torch.testing.assert_close(output(model, batch), before)
