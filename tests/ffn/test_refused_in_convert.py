"""What cannot be made switchable is refused in `convert`, with the reason, and nothing has been changed then."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ffn import home_made
from ffn.home_made import Gpt, make
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from switchable import Family, InputError, SwitchConfig, convert
from switchable.ffn.convert import layers_of

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, backend="reference")
IDS = torch.randint(0, 31, (3, 10), generator=torch.Generator().manual_seed(1))


def refused(model: nn.Module, says: str, family: Family | None = None) -> None:
    """Weights, buffers, settings, random numbers and logits are as before, bit for bit."""
    model.train()
    model.h[1].eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [
        (m.training, {n: v for n, v in vars(m).items() if isinstance(v, float)}) for m in model.modules()
    ]
    learns = [p.requires_grad for p in model.parameters()]
    names = [n for n, _ in model.named_modules()]
    rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    logits = _logits(model)
    with pytest.raises(InputError, match=says):
        convert(model, CONFIG, family)
    assert not layers_of(model)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert np.array_equal(np.random.get_state()[1], rng[2])  # noqa: NPY002
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == learns
    assert flags == [
        (m.training, {n: v for n, v in vars(m).items() if isinstance(v, float)}) for m in model.modules()
    ]
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[n], state[n]) for n in state)
    assert torch.equal(_logits(model), logits)


def _logits(model: nn.Module) -> Tensor:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        found: Tensor = model(IDS)[0]
        return found


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (home_made.OtherGradient, r"the activation between h\.0\.up and h\.0\.down is relu2 with another gradient"),
        (home_made.HiddenNumber, r"before h\.0\.down a dropout of 0\.2 is applied whose nn\.Dropout or attribute"),
        (home_made.NormBetween, r"between h\.0\.up and h\.0\.down, h\.0\.norm \(LayerNorm\) has parameters"),
        (home_made.Prelu, r"between h\.0\.up and h\.0\.down, h\.0\.slope \(PReLU\) has parameters"),
        (home_made.UsedTwice, r"no FFN found"),
        (home_made.Doubles, r"h\.0\.up \(Doubling\) is more than its weight and bias"),
    ],
)  # fmt: skip
def test_what_is_no_ffn_of_ours(layer: Callable[[], nn.Module], says: str) -> None:
    refused(make(layer), says)


HANGING: dict[str, tuple[Callable[[Gpt], object], str]] = {
    "a hook": (
        lambda m: m.h[0].up.register_forward_hook(lambda _m, _x, y: y + 1),
        r"h\.0\.up has hooks",
    ),
    "a mask": (
        lambda m: prune.l1_unstructured(m.h[0].up, "weight", 0.5),
        r"h\.0\.up has hooks \(or a mask\)",
    ),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(m.h[0].down, "weight", nn.Identity()),
        r"h\.0\.down has a parametrization",
    ),
    "an adapter": (
        lambda m: setattr(m.h[0], "up", Lora(m.h[0].up)),
        r"h\.0\.up \(Lora\) is more than its weight and bias; merge it into",
    ),
    "an adapter around it": (
        lambda m: setattr(m.h[0], "up", Around(m.h[0].up)),
        r"h\.0\.up \(Around\) is an adapter; merge it into",
    ),
    "an adapter around the output": (
        lambda m: setattr(m.h[0], "down", Around(m.h[0].down)),
        r"h\.0\.down \(Around\) is an adapter; merge it into",
    ),
    "quantised": (lambda m: setattr(m.h[0], "up", Quantised(8, 32)), r"h\.0\.up \(Quantised\) is quantised"),
    "experts": (
        lambda m: setattr(m.h[0], "experts", nn.Linear(2, 2)),
        r"h\.0\.experts \(Linear\) is a mixture",
    ),
    "another layer": (
        lambda m: setattr(m.h[1], "act", torch.sin),
        r"h\.1\.down does not belong to an FFN as h\.0\.down does: between h\.1\.up and h\.1\.down, no activation",
    ),
}


class Lora(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x))


class Around(nn.Module):
    """As peft has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class Quantised(nn.Linear):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(torch.ones(d_out, d_in, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 0.1 * self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("what", HANGING)
def test_what_hangs_on_a_projection(what: str) -> None:
    hang, says = HANGING[what]
    model = make(home_made.Projections)
    hang(model)
    refused(model, says)


@pytest.mark.parametrize(
    ("layer", "family", "says"),
    [
        (home_made.Gated, Family("Gated", gate="up", up="gate", down="down", activation=None, activation_fn="silu",
                                 in_layer=True), "the model computes something else with it; are gate and up"),
        (home_made.InLayer, Family("InLayer", "up", "down", activation=None, activation_fn="relu", in_layer=True),
         "computes something else"),
        (home_made.Fused, Family("Fused", "both", "down", gate="both", fused="up-gate", activation=None,
                                 activation_fn="relu"), "computes something else"),
        (home_made.DropsOut, Family("DropsOut", "up", "down", activation=None, activation_fn="relu",
                                    dropout="behind"), "computes something else"),
        (home_made.DropsOutByNumber, Family("DropsOutByNumber", "up", "down", activation=None,
                                            activation_fn="relu", in_layer=True), "computes something else"),
        (home_made.OtherGradient, Family("OtherGradient", "up", "down", activation=None, activation_fn="relu2"),
         "computes something else"),
    ],
)  # fmt: skip
def test_a_wrong_description(layer: Callable[[], nn.Module], family: Family, says: str) -> None:
    refused(make(layer), says, family)


def test_a_sequential_whose_children_run_twice() -> None:
    class Twice(home_made.InLayer):
        def __init__(self) -> None:
            super().__init__()
            self.acts = nn.Sequential(nn.Tanh(), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.acts(self.up(x)))

    family = Family("Twice", "up", "down", activation="acts.0", in_layer=True)
    refused(make(Twice), "the model computes something else with it", family)


def test_a_model_on_the_meta_device_has_nothing_to_look_at() -> None:
    with torch.device("meta"):
        model = Gpt(home_made.Projections)
    with pytest.raises(InputError, match=r"meta device.*describe its FFNs"):
        convert(model, CONFIG)


def test_a_batch_that_the_model_does_not_take() -> None:
    with pytest.raises(InputError, match=r"Gpt cannot be tried out in evaluation \(.*example_inputs"):
        convert(make(home_made.Projections), CONFIG, example_inputs={"nothing": IDS})


@pytest.mark.parametrize(
    "given",
    [
        {"activation": None}, {"activation_fn": "relu"}, {"activation": None, "activation_fn": "rely"},
        {"fused": "halves"}, {"fused": "gate-up", "gate": "w1"},
    ],
)  # fmt: skip
def test_a_description_that_contradicts_itself(given: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"activation|fused="):
        Family("MLP", "up", "down", **given)
