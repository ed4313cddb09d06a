"""What hangs on a projection counts in sparse mode too, or is refused there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families.models import inputs, make, output
from support import tiny_gpt2
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.switching.controller import Controller
from switchable.switching.switch import regroup


class LoRA(nn.Module):
    """An adapter as a library writes one."""

    def __init__(self, base: nn.Module, inputs: int = 16, outputs: int = 64) -> None:
        super().__init__()
        self.base_layer, self.weight, self.bias = base, base.weight, base.bias
        self.delta = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.delta(x)
        return y


def wrap(projection: nn.Module, model: nn.Module) -> None:
    model.set_submodule("transformer.h.0.mlp.c_fc", LoRA(projection))


HANGING: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "an adapter": wrap,
    "a forward hook": lambda p, _: p.register_forward_hook(lambda _p, _x, y: y + 1),
    "a forward pre-hook": lambda p, _: p.register_forward_pre_hook(lambda _p, x: (x[0] * 2,)),
    "a backward hook": lambda p, _: p.register_full_backward_hook(lambda *_: None),
    "a mask": lambda p, _: prune.l1_unstructured(p, "weight", 0.5),
    "a forward of its own": lambda p, _: setattr(p, "forward", type(p).forward.__get__(p)),
}


@pytest.fixture
def model() -> nn.Module:
    made = tiny_gpt2()
    convert(made, SwitchConfig(num_experts=8, experts_per_token=8), neuron_major=False)  # pruning wants it so
    return made.eval()


@pytest.mark.parametrize("hang", HANGING.values(), ids=HANGING.keys())
def test_it_is_refused_when_the_mode_is_set_and_at_the_next_call(
    model: nn.Module, tokens: Tensor, hang: Callable[[nn.Module, nn.Module], object]
) -> None:
    set_mode(model, "sparse")
    few = tokens[:1, :4]
    with torch.no_grad():
        model(input_ids=few)  # what decoding has prepared must notice, too
    hang(model.get_submodule("transformer.h.0.mlp.c_fc"), model)
    says = (
        r"h\.0\.mlp\.c_fc (is a LoRA|is a Conv1D|has hooks).* sparse mode passes by; merge it into the weight"
    )
    if hang is not HANGING["a backward hook"]:  # there is no backward pass
        with torch.no_grad(), pytest.raises(InputError, match=says):
            model(input_ids=few)
    with pytest.raises(InputError, match=says):
        model(input_ids=tokens)
    set_mode(model, "dense")
    model(input_ids=tokens)
    with pytest.raises(InputError, match=says):
        set_mode(model, "sparse")
    assert layers_of(model)[1].ssd.mode == "dense"


def test_an_activation_exchanged_after_converting_is_refused(model: nn.Module, tokens: Tensor) -> None:
    set_mode(model, "sparse")
    model(input_ids=tokens)
    model.set_submodule("transformer.h.0.mlp.act", nn.Tanh())
    says = r"h\.0\.mlp\.act has become a Tanh, and sparse mode computes relu; exchange the activation before convert"
    with pytest.raises(InputError, match=says):
        model(input_ids=tokens)
    with pytest.raises(InputError, match=says):
        set_mode(model, "sparse")


@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
def test_a_parametrization_counts_in_both_modes(model: nn.Module, tokens: Tensor, name: str) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    set_mode(model, "sparse")
    with torch.no_grad():
        before = model(input_ids=tokens[:1, :4]).logits
        parametrize.register_parametrization(
            model.get_submodule(f"transformer.h.0.mlp.{name}"), "weight", Double()
        )
        sparse = model(input_ids=tokens[:1, :4]).logits
        set_mode(model, "dense")
        torch.testing.assert_close(sparse, model(input_ids=tokens[:1, :4]).logits)
    assert (sparse - before).abs().max() > 1e-3


def test_a_hook_on_the_router_counts_while_decoding(model: nn.Module, tokens: Tensor) -> None:
    set_mode(model, "sparse", 3)
    with torch.no_grad():
        before = model(input_ids=tokens[:1, :4]).logits
        hook = layers_of(model)[0].router.register_forward_hook(lambda _r, _x, scores: -scores)
        assert not torch.allclose(model(input_ids=tokens[:1, :4]).logits, before)
        hook.remove()
        torch.testing.assert_close(model(input_ids=tokens[:1, :4]).logits, before)


@pytest.mark.parametrize("what", ["an adapter", "a mask", "a parametrization"])
def test_neurons_are_not_moved_away_from_what_hangs_on_them(model: nn.Module, what: str) -> None:
    projection = model.get_submodule("transformer.h.0.mlp.c_fc")
    if what == "a parametrization":
        parametrize.register_parametrization(projection, "weight", nn.Identity())
    else:
        HANGING[what](projection, model)
    kept = [p.clone() for p in model.parameters()]
    labels_F = torch.arange(64) % 8
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_fc (is a LoRA|has hooks|has a parametrization)"):
        regroup(layers_of(model), [labels_F, labels_F], None)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


LAYERS = {
    "opt": ("model.decoder.layers.0", "fc1", "fc2"),
    "bert": ("bert.encoder.layer.0", "intermediate.dense", "output.dense"),
    "bart": ("model.decoder.layers.0", "fc1", "fc2"),
}


def in_layer(case: str) -> tuple[nn.Module, dict[str, Tensor], str, str]:
    """A converted model whose layers call the projections themselves, its inputs, and the projections of one FFN."""
    made = make(case).eval()
    convert(made, SwitchConfig(num_experts=8, experts_per_token=8), neuron_major=False)  # as pruning wants it
    layer, up, down = LAYERS[case]
    return made, inputs(case), f"{layer}.{up}", f"{layer}.{down}"


def assert_counts_in_both_modes(model: nn.Module, batch: dict[str, Tensor], before: Tensor) -> None:
    """What was put on a projection changes the output, of both modes alike (all experts are on)."""
    found = []
    for mode in ("dense", "sparse"):
        set_mode(model, mode)
        found.append(output(model, batch))
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - before).abs().max() > 1e-4


@pytest.mark.parametrize("which", ["up", "down"])
@pytest.mark.parametrize("case", LAYERS)
def test_an_adapter_in_a_layer_is_refused_in_either_mode(case: str, which: str) -> None:
    """Also where d_ff = d_model, so that shapes would fit."""
    model, batch, up, down = in_layer(case)
    name = up if which == "up" else down
    held, before = model.get_submodule(name), output(model, batch)
    model.set_submodule(name, LoRA(held, held.in_features, held.out_features))
    with pytest.raises(
        InputError, match=r"has become a LoRA, which neither mode can call there; put adapters on"
    ):
        output(model, batch)
    with pytest.raises(InputError, match=r"is a LoRA, which sparse mode passes by"):
        set_mode(model, "sparse")
    model.set_submodule(name, held)  # as merging does
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("case", LAYERS)
def test_hooks_in_a_layer_count_alike_in_both_modes(case: str) -> None:
    model, batch, up, down = in_layer(case)
    plain = output(model, batch)
    for name in (up, down):
        hook = model.get_submodule(name).register_forward_hook(lambda _m, _x, y: 1.5 * y)
        assert_counts_in_both_modes(model, batch, plain)
        hook.remove()


@pytest.mark.parametrize("case", LAYERS)
def test_a_mask_in_a_layer_counts_alike_in_both_modes(case: str) -> None:
    model, batch, up, down = in_layer(case)
    plain = output(model, batch)
    for name in (up, down):
        projection = model.get_submodule(name)
        weight = projection.weight.detach().clone()
        prune.l1_unstructured(projection, "weight", 0.5)
        assert int((projection.weight == 0).sum()) == weight.numel() // 2
        assert_counts_in_both_modes(model, batch, plain)


class Bare(nn.Module):
    """An adapter without a weight of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y


class Rewritten(nn.Linear):
    """Says that it is a Linear, and holds the weight of a Conv1D."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(1, 1)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("part", ["c_fc", "c_proj"])
@pytest.mark.parametrize("adapter", [Bare, Rewritten, LoRA])
def test_an_adapter_whose_weight_cannot_be_measured_is_refused_before_dense_training(
    adapter: Callable[[nn.Module], nn.Module], part: str, tokens: Tensor
) -> None:
    config = SwitchConfig(num_experts=8, experts_per_token=3, recipe="dense", monitor_every=1)
    made = tiny_gpt2()
    convert(made, config)
    name = f"transformer.h.0.mlp.{part}"
    held = made.get_submodule(name)
    made.set_submodule(name, adapter(held))
    with pytest.raises(InputError, match=rf"h\.0\.mlp\.{part} has become a {adapter.__name__}, whose weight"):
        Controller(made, tokens, 4)
    made.set_submodule(name, held)
    Controller(made, tokens, 4)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_an_adapter_on_a_linear_is_measured_in_dense_training(part: str) -> None:
    made = make("phi")
    convert(made, SwitchConfig(num_experts=8, experts_per_token=3, recipe="dense", monitor_every=1))
    name = f"model.layers.0.mlp.{part}"
    held = made.get_submodule(name)
    made.set_submodule(name, LoRA(held, held.in_features, held.out_features))
    controller = Controller(made, inputs("phi"), 4)
    assert controller.step(torch.optim.SGD(made.parameters(), lr=0.1)) is not None
