"""What the benchmarks of FFNs share: one FFN, dense and sparse, with a batch and a choice of experts.

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.transformers_mm import batched_mm, grouped_mm
from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.choose import expert_ffn
from switchable.compute.cpu.experts.library import library
from switchable.compute.cpu.topk import top_experts
from switchable.ffn.router import Router

TRANSFORMERS = {"grouped_mm": grouped_mm, "batched_mm": batched_mm}
"""How transformers computes experts; its `eager` is a loop like our `reference`."""


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    F: int
    E: int = 32
    K: int = 6
    gated: bool = False

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} F={self.F} E={self.E} K={self.K}{' gated' if self.gated else ''}"

    @property
    def product_flops(self) -> float:
        """Of one projection of the dense layer."""
        return 2.0 * self.T * self.D * self.F

    @property
    def forward_flops(self) -> float:
        """Of the dense layer."""
        return (3 if self.gated else 2) * self.product_flops


TRAINING = [Shape(4096, D, 4 * D) for D in (256, 512, 768)]
GATED = Shape(4096, 768, 2048, gated=True)


class Layer:
    """One FFN as `nn.Linear` stores it, a batch, and a choice of experts. A gated one is Llama's: without biases."""

    def __init__(self, shape: Shape, seed: int = 0):
        torch.manual_seed(seed)
        self.shape = shape
        self.x_TD = torch.randn(shape.T, shape.D, requires_grad=True)
        self.up = torch.nn.Linear(shape.D, shape.F, bias=not shape.gated)
        self.gate = torch.nn.Linear(shape.D, shape.F, bias=False) if shape.gated else None
        self.down = torch.nn.Linear(shape.F, shape.D, bias=False)
        self.down_FD = self.down.weight.detach().t().contiguous().requires_grad_()
        self.ids_TK = torch.rand(shape.T, shape.E).topk(shape.K).indices
        self.dy_TD = torch.randn(shape.T, shape.D)
        self.router = Router(shape.D, shape.E)

    def leaves(self) -> dict[str, Tensor]:
        """What learns in the sparse layer."""
        optional = {"bias": self.up.bias, "gate": None if self.gate is None else self.gate.weight}
        own = {"x": self.x_TD, "up": self.up.weight, "down": self.down_FD}
        return own | {name: leaf for name, leaf in optional.items() if leaf is not None}

    def call(self, leaves: dict[str, Tensor] | None = None) -> ExpertCall:
        """The sparse layer's call, with other numbers than its own ones if they are given."""
        own = self.leaves() if leaves is None else leaves
        weights = FFNWeights(own["up"], own["down"], own.get("bias"), own.get("gate"))
        return ExpertCall(own["x"], weights, self.ids_TK, self.shape.E, "relu")

    def forward(self, name: str) -> Tensor:
        if name == "dense":
            return dense_ffn(self.leaves(), self.down.weight)
        if name in TRANSFORMERS:
            return TRANSFORMERS[name](self.call())
        return expert_ffn(self.call(), "reference" if name == "eager" else name)

    def forget(self) -> None:
        """Free all gradients, and the memory that compiled loops keep from call to call."""
        self._zero_grad()
        library.cache_clear()

    def _zero_grad(self) -> None:
        for leaf in (*self.leaves().values(), self.down.weight):
            leaf.grad = None

    def train(self, name: str) -> None:
        self._zero_grad()
        torch.autograd.backward(self.forward(name), self.dy_TD)

    def route(self) -> None:
        top_experts(self.router(self.x_TD.detach()).detach(), self.shape.K)


def dense_ffn(leaves: dict[str, Tensor], down_DF: Tensor) -> Tensor:
    """Return a dense FFN's output."""
    up_TF = linear(leaves["x"], leaves["up"], leaves.get("bias"))
    if "gate" not in leaves:
        return linear(torch.relu(up_TF), down_DF)
    return linear(torch.relu(linear(leaves["x"], leaves["gate"])) * up_TF, down_DF)
