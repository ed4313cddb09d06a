"""Models that somebody wrote by hand, none of them known to the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

WIDTH, NEURONS = 8, 32


class Attention(nn.Module):
    """Mixes tokens, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nnf.scaled_dot_product_attention(q, k, v, is_causal=True))


class Gpt(nn.Module):
    """A language model in the style of nanoGPT: `idx` in, logits and loss out."""

    def __init__(self, layer: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, WIDTH)
        self.attention = nn.ModuleList([Attention() for _ in range(layers)])
        self.h = nn.ModuleList([layer() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, 31, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.embedding(idx)
        for attention, layer in zip(self.attention, self.h, strict=True):
            x = x + attention(nnf.rms_norm(x, (WIDTH,)))
            x = x + layer(nnf.rms_norm(x, (WIDTH,)))
        logits = self.head(x)
        return logits, None if targets is None else nnf.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Projections(nn.Module):
    """Two projections; subclasses say what is done with them."""

    linear: type[nn.Linear] = nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = self.linear(WIDTH, NEURONS), self.linear(NEURONS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    def act(self, x: Tensor) -> Tensor:
        return nnf.relu(x).square()


class Relu2(torch.autograd.Function):
    """Squared ReLU with a backward pass written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * x.clamp_min(0)


class StraightThrough(Relu2):
    """The same numbers, another gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class ByHand(Projections):
    def act(self, x: Tensor) -> Tensor:
        return Relu2.apply(x)


class OtherGradient(Projections):
    def act(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x)


class InLayer(Projections):
    """The layer does other things too, and its activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.scale * self.down(self.act(self.up(x))))


class InPlace(InLayer):
    def act(self, x: Tensor) -> Tensor:
        return nnf.relu_(x)


class Gated(InLayer):
    """A gated FFN among other things, nothing in it a module but the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NEURONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(nnf.silu(self.gate(x)) * self.up(x)))


class Fused(nn.Module):
    """Gate and up in one projection; `order` says how."""

    order = "gate-up"

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * NEURONS), nn.Linear(NEURONS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        first, second = (
            (both[..., 0::2], both[..., 1::2]) if "interleaved" in self.order else both.chunk(2, dim=-1)
        )
        gate, up = (first, second) if self.order.startswith("gate") else (second, first)
        return self.down(nnf.relu(gate) * up)


class UpFirst(Fused):
    order = "up-gate"


class Interleaved(Fused):
    order = "gate-up-interleaved"


class UpFirstInterleaved(Fused):
    order = "up-gate-interleaved"


class FusedInLayer(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * super().forward(x)


class Casting(nn.Linear):
    """Weights in one precision, numbers in another, as nanochat has it."""

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Casts(Projections):
    linear = Casting


class Doubling(nn.Linear):
    """Not what `nn.Linear` computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubles(Projections):
    linear = Doubling


class DropsOut(Projections):
    """Dropouts everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.behind = nn.Dropout(0.25), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.down(self.inside(nnf.relu(self.up(x)))))


class DropsOutInLayer(InLayer):
    """A module and a number; the number is zero now, but need not stay so."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.residual_dropout = nn.Dropout(0.25), 0.3

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.inside(nnf.relu(self.up(x))))
        return x + nnf.dropout(y, self.residual_dropout, self.training)


class DropsOutByNumber(InLayer):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = 0.25

    def forward(self, x: Tensor) -> Tensor:
        y = nnf.dropout(nnf.relu(self.up(x)), self.dropout, self.training)
        return self.norm(x + self.down(y))


class HiddenNumber(Projections):
    """Its dropout's probability is nowhere to be found."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nnf.dropout(nnf.relu(self.up(x)), 0.2, self.training))


class NormBetween(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(NEURONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(nnf.relu(self.up(x))))


class Prelu(Projections):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.PReLU()

    def act(self, x: Tensor) -> Tensor:
        return self.slope(x)


class UsedTwice(Projections):
    """The input projection serves something else too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nnf.relu(self.up(x))) + self.up(0.5 * x)[..., :WIDTH]


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.ReLU(), nn.Linear(NEURONS, WIDTH), nn.Dropout(0.2))


SUPPORTED: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Projections, ByHand, InLayer, InPlace, Gated, Fused, UpFirst, Interleaved, UpFirstInterleaved, FusedInLayer,
        Casts, DropsOut, DropsOutInLayer, DropsOutByNumber,
    )
} | {"sequential": sequential}  # fmt: skip


def make(layer: Callable[[], nn.Module]) -> Gpt:
    """A model of two layers, random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = Gpt(layer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()
