"""What looks like an FFN and is not made switchable: the report names each, with the reason."""

from __future__ import annotations

import pytest
import torch
from ffn.home_made import NEURONS, WIDTH, Gpt, Projections, make
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.ffn.trial import Trial

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)


class Sized(Projections):
    """An FFN with other sizes, and perhaps another activation."""

    def __init__(self, neurons: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, neurons), nn.Linear(neurons, WIDTH)
        self.activation = activation or nn.ReLU()

    def act(self, x: Tensor) -> Tensor:
        return self.activation(x)


class Between(Gpt):
    """Besides the layers' FFNs one stands behind them, if it is called."""

    def __init__(self, behind: nn.Module, called: bool = True) -> None:
        super().__init__(Projections)
        self.behind, self.called = behind, called

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits, loss = super().forward(idx, targets)
        x = logits[..., :WIDTH]
        return (torch.cat([logits, x + self.behind(x)], -1) if self.called else logits), loss


def test_an_ffn_in_no_layer_with_the_layers_sizes_is_one() -> None:
    model = Between(Projections())
    report = convert(model, CONFIG)
    assert [layer.ssd.name for layer in layers_of(model)] == ["h.0", "h.1", "behind"]
    assert report.left_alone == {}
    assert "left alone" not in str(report)


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0.5, 0.5 * x, 0.0)


@pytest.mark.parametrize(
    ("behind", "called", "name", "why"),
    [
        (Sized(2 * NEURONS), True, "behind.down", "it is in no layer and has sizes of its own"),
        (nn.ModuleList([Sized(WIDTH // 2)]), True, "behind.*.down", "it is narrower than the model"),
        (
            Sized(NEURONS, Halving()),
            True,
            "behind.down",
            r"its activation, behind.activation (Halving), is not",
        ),
        (Projections(), False, "behind.down", "no batch reaches it"),
    ],
)
def test_what_is_left_alone_is_named(behind: nn.Module, called: bool, name: str, why: str) -> None:
    if isinstance(behind, nn.ModuleList):
        behind.forward = behind[0].forward
    model = Between(behind, called)
    report = convert(model, CONFIG)
    assert [layer.ssd.name for layer in layers_of(model)] == ["h.0", "h.1"]
    assert report.converted == 2
    assert list(report.left_alone) == [name]
    assert report.left_alone[name].startswith(why)
    assert f"left alone: {name}, {why}" in str(report)


def test_one_projection_in_turn_with_two_others() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, NEURONS), nn.Linear(WIDTH, NEURONS)
            self.down = nn.Linear(NEURONS, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.first(x).relu()) + self.down(self.second(x).relu())

    report = convert(Between(Twice()), CONFIG)
    assert report.converted == 2
    assert report.left_alone["behind.down"].startswith("it is not called with the same input projection")


def test_nothing_is_said_of_attention() -> None:
    class Wide(nn.Module):
        """Heads wider than the model."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, NEURONS) for _ in range(3))
            self.norm, self.out = nn.LayerNorm(NEURONS), nn.Linear(NEURONS, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            mixed = nn.functional.scaled_dot_product_attention(self.norm(self.q(x)), self.k(x), self.v(x))
            return self.out(mixed)

    assert convert(Between(Wide()), CONFIG).left_alone == {}


def test_the_search_takes_six_passes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, run = [], Trial.run
    monkeypatch.setattr(Trial, "run", lambda self, training: passes.append(training) or run(self, training))
    convert(make(Projections), CONFIG)
    assert passes == [False, False, True, True, False, True]
