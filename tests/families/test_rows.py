"""The table's rows: each fits its models, and where one does not, or none is there, that is said."""

from __future__ import annotations

import pytest
import torch
from families.models import CASES, make
from torch import Tensor, nn

from switchable import Family, InputError, SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.ffn.ssd import RESERVED
from switchable.ffn.table import FAMILIES, row_of

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, backend="reference")


def test_every_row_of_the_table_has_a_case() -> None:
    assert {make(case).config.model_type for case in CASES} == set(FAMILIES)


def test_encoder_and_decoder_are_counted_each_by_its_own_number() -> None:
    model = make("t5")
    model.config.num_decoder_layers = 4
    with pytest.raises(InputError, match=r"found 5 of 6 FFNs of class 'T5DenseActDense'"):
        convert(model, CONFIG)
    assert not layers_of(model)


def test_a_model_without_ffns_says_what_was_found_and_how_to_describe_one() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x).relu()))

    with pytest.raises(InputError) as raised:
        convert(nn.Sequential(Layer()), CONFIG)
    message = str(raised.value)
    assert "between 0.up and 0.down, 0.norm (LayerNorm) has parameters" in message
    assert "Layer (up (24, 6), down (6, 24))" in message
    assert message.count("\n    ") == 3


def test_a_row_that_leaves_out_a_part_is_noticed() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act, self.norm = (
                nn.Linear(6, 24),
                nn.Linear(24, 6),
                nn.ReLU(),
                nn.LayerNorm(24),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.act(self.up(x))))

    model = nn.Sequential(Scaled())
    with pytest.raises(InputError, match=r"0 \(Scaled\) computes something else"):
        convert(model, SwitchConfig(num_experts=4, experts_per_token=2), Family("Scaled", "up", "down"))
    with pytest.raises(InputError, match=r"0\.gate is missing; it must be Linear or Conv1D"):
        convert(
            model,
            SwitchConfig(num_experts=4, experts_per_token=2),
            Family("Scaled", "up", "down", gate="gate"),
        )
    assert isinstance(model[0], Scaled)


def test_a_part_whose_name_we_need() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up, self.down = nn.ReLU(), nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.router(self.up(x)))

    model, x = nn.Sequential(Mlp()), torch.randn(3, 6)
    before, config = model(x), SwitchConfig(num_experts=4, experts_per_token=2)
    with pytest.raises(InputError, match=r"a part called 'router', a name that we need.*in_layer=True"):
        convert(model, config, Family("Mlp", "up", "down", "router"))
    convert(model, config, Family("Mlp", "up", "down", "router", in_layer=True))
    torch.testing.assert_close(model(x), before)


def test_names_that_are_ours_are_known_as_such_and_natural_ones_are_free() -> None:
    model = make("gpt2")
    convert(model, CONFIG)
    own = set(vars(layers_of(model)[0])) - set(vars(nn.Module()))
    assert own <= set(RESERVED)
    free = {
        "activation",
        "act",
        "up",
        "down",
        "gate",
        "fc1",
        "w1",
        "dropout",
        "norm",
        "proj",
        "lin1",
        "dense",
    }
    assert not free & (set(RESERVED) | set(dir(type(layers_of(model)[0]))))


def test_a_mixture_of_experts_and_odd_activations_are_refused() -> None:
    model = make("gpt2")
    model.transformer.h[0].add_module("router", nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"routers of its own \(transformer\.h\.0\.router\.weight\)"):
        convert(model, CONFIG)
    model = make("gpt2")
    model.transformer.h[1].mlp.act = nn.PReLU()
    with pytest.raises(InputError, match=r"activation of transformer\.h\.1\.mlp, PReLU, has parameters"):
        convert(model, CONFIG)


def test_which_row_depends_on_the_model_not_only_on_its_type() -> None:
    assert row_of(make("t5")).ffn == "T5DenseActDense"
    assert row_of(make("t5-gated")).gate == "wi_0"
