"""Timing the ways of multiplying a shape, in turns: a slow phase of the machine hits all of them.

Shapes: T tokens, D d_model, E experts, F d_ff, K experts per token.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from switchable.compute.cpu.decode.compiled import few_tokens
from switchable.compute.cpu.topk import top_experts
from switchable.compute.shape import Shape, candidates
from switchable.compute.weights import FFNWeights

FEW_TOKENS = 64
"""Up to so many, reading the weights is most of the time, and they must not come from the cache."""
CACHE_BYTES = 64 * 2**20
"""Weights to go through before the first ones are used again."""
SECONDS = 0.3
"""To spend on each candidate; at least three rounds are timed."""


def measure(shape: Shape) -> dict[str, float]:
    """Time dense and the candidates in turns, on random weights and tokens; return median seconds by name."""
    with torch.inference_mode(False), torch.autocast(shape.device, enabled=False):
        contenders = _contenders(shape)
        start = time.perf_counter()
        for calls in contenders.values():
            _seconds(calls, shape)
        rounds = max(3, min(25, int(SECONDS * len(contenders) / (time.perf_counter() - start))))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, calls in contenders.items():
                times[name].append(_seconds(calls, shape))
        return {name: statistics.median(values) for name, values in times.items()}


@dataclass
class _Layer:
    """Random weights of one layer, stored neuron by neuron as `convert` leaves them, and a batch."""

    shape: Shape
    generator: torch.Generator

    def __post_init__(self) -> None:
        T, D, F, E = self.shape.tokens, self.shape.d_model, self.shape.d_ff, self.shape.num_experts
        self.x_TD, self.up_FD, self.down_FD = self._normal(T, D), self._normal(F, D), self._normal(F, D)
        self.bias_F, self.router_ED, self.router_E = self._normal(F), self._normal(E, D), self._normal(E)

    def _normal(self, *size: int) -> Tensor:
        values = torch.randn(*size, generator=self.generator).to(self.shape.device, self.shape.dtype)
        return values.requires_grad_(self.shape.training)

    def dense(self) -> Tensor:
        hidden_TF: Tensor = ACT2FN[self.shape.activation](linear(self.x_TD, self.up_FD, self.bias_F))
        return linear(hidden_TF, self.down_FD.t())

    def sparse(self, implementation: str) -> Tensor:
        """With the router, since dense needs none."""
        from switchable.compute.choose import expert_ffn

        weights = FFNWeights(self.up_FD, self.down_FD, self.bias_F)
        if implementation == "decode":
            router = (self.router_ED, self.router_E)
            y_TD: Tensor | None = few_tokens(
                self.x_TD,
                weights,
                router,
                self.shape.num_experts,
                self.shape.experts_per_token,
                activation=self.shape.activation,
            )
            if y_TD is not None:
                return y_TD
        scores_TE = linear(self.x_TD.detach(), self.router_ED, self.router_E)
        return expert_ffn(
            self.x_TD,
            weights,
            top_experts(scores_TE, self.shape.experts_per_token),
            None,
            num_experts=self.shape.num_experts,
            activation=self.shape.activation,
            implementation=implementation,
        )


def _contenders(shape: Shape) -> dict[str, list[Callable[[], Tensor]]]:
    """The calls to time, by name: one per layer, so that a few tokens find the weights outside the cache."""
    layer_bytes = 2 * shape.d_model * shape.d_ff * shape.dtype.itemsize
    few = shape.tokens <= FEW_TOKENS and not shape.training
    generator = torch.Generator().manual_seed(0)
    layers = [
        _Layer(shape, generator) for _ in range(max(2, min(64, CACHE_BYTES // layer_bytes)) if few else 1)
    ]
    contenders: dict[str, list[Callable[[], Tensor]]] = {"dense": [layer.dense for layer in layers]}
    for name in candidates(shape):
        contenders[name] = [functools.partial(layer.sparse, name) for layer in layers]
    return contenders


def _seconds(calls: list[Callable[[], Tensor]], shape: Shape) -> float:
    """Seconds per call; the device has finished at both ends."""
    with torch.set_grad_enabled(shape.training):
        _wait(shape)
        start = time.perf_counter()
        for call in calls:
            y_TD = call()
            if shape.training:
                torch.autograd.backward(y_TD, torch.ones_like(y_TD))
        _wait(shape)
        return (time.perf_counter() - start) / len(calls)


def _wait(shape: Shape) -> None:
    if shape.device == "cuda":
        torch.cuda.synchronize()
