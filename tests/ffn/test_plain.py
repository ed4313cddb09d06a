"""What hangs on a projection counts in sparse mode too, or is refused there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.switching.switch import regroup


class LoRA(nn.Module):
    """An adapter as a library writes one."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.weight, self.bias = base, base.weight, base.bias
        self.delta = nn.Linear(16, 64, bias=False)

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
