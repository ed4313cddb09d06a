"""The FFN of one layer for decoding, dense or sparse, on weights of any width.

    few tokens, ReLU types   one call of compiled code (`compute/cpu/decode`): dense mode is the call with all experts,
                             of whose `down` only the rows of neurons that fire are read
    many                     the products that training takes: `expert_ffn`, or two of torch's
    other activations        dense mode alone, by torch's activation between our products

Shapes: T tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from switchable.compute.activations import activation_named
from switchable.compute.call import ExpertCall, FFNWeights
from switchable.compute.choose import expert_ffn
from switchable.compute.cpu.decode.compiled import DecodeCall, has_code, prepare_call
from switchable.compute.cpu.decode.norm import Norm
from switchable.compute.cpu.experts.fused import prepare_prefill
from switchable.compute.cpu.topk import top_experts
from switchable.ffn.convert import layers_of
from switchable.ffn.families import Family, d_in, neuron_dim
from switchable.ffn.ssd import SSD
from switchable.ffn.table import FAMILIES
from switchable.infer.decoding.families import BlockParts, Parts
from switchable.infer.decoding.matrices import Matrices, Matrix, numbers

MOST_SPARSE, MOST_DENSE = 48, 16
"""Tokens up to which the compiled call is faster; measured with D 256 to 768, bfloat16, one thread."""

FFN = Callable[[Tensor, Tensor], Tensor]
"""(x [T, D], what is added [T, D]) -> what is added + FFN(norm(x))."""


class FFNParts(NamedTuple):
    """An FFN's modules, switchable or not."""

    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None
    activation: str
    ssd: SSD | None
    """None: a plain FFN."""

    @property
    def d_model(self) -> int:
        """The width of what it reads."""
        return d_in(self.up)

    @property
    def is_compiled(self) -> bool:
        """Whether there is code for its experts."""
        experts = 1 if self.ssd is None else self.ssd.num_experts
        return has_code(self.d_model, experts, torch.float32, self.activation)


def ffns_of(model: nn.Module, parts: Parts) -> list[FFNParts] | None:
    """Return the FFNs of a model's layers; None where they are not what their family's usually are."""
    if layers := layers_of(model):
        if len(layers) != len(parts.blocks) or any(layer.ssd.settings.family.fused for layer in layers):
            return None
        ssds = [layer.ssd for layer in layers]
        return [
            FFNParts(s.up_projection, s.down_projection, s.gate_projection, s.settings.activation, s)
            for s in ssds
        ]
    config = cast(Any, model.config)
    family = FAMILIES.get(config.model_type)
    if not isinstance(family, Family):
        return None
    return [_plain(block, family, getattr(config, family.activation_setting)) for block in parts.blocks]


def _plain(block: BlockParts, family: Family, activation: str) -> FFNParts:
    def at(path: str) -> nn.Linear:
        return cast(nn.Linear, block.ffn.get_submodule(path))

    gate = None if family.gate is None else at(family.gate)
    return FFNParts(at(family.up), at(family.down), gate, activation, None)


def ffn(parts: FFNParts, name: str, matrices: Matrices, norm: Norm) -> FFN:
    """Take an FFN's weights over, and return what computes it, with the norm before it."""
    if parts.is_compiled:
        return ByNeuron(parts, name, matrices, norm)
    gate = None if parts.gate is None else matrices.matrix(f"{name}.gate", parts.gate)
    up, down = matrices.matrix(f"{name}.up", parts.up), matrices.matrix(f"{name}.down", parts.down)
    return Dense(up, down, gate, parts.activation, norm)


class Dense:
    """An FFN with any activation, all of it."""

    def __init__(self, up: Matrix, down: Matrix, gate: Matrix | None, activation: str, norm: Norm):
        self.up, self.down, self.gate, self.act = up, down, gate, activation_named(activation)
        self.norm = norm

    def __call__(self, x_TD: Tensor, add_TD: Tensor) -> Tensor:
        """Return add + FFN(norm(x))."""
        x_TD = self.norm(x_TD)
        hidden_TF = self.act((self.gate or self.up)(x_TD))
        if self.gate is not None:
            hidden_TF = hidden_TF * self.up(x_TD)
        return self.down(hidden_TF, add_TD)


class ByNeuron:
    """An FFN of a ReLU type whose matrices lie neuron by neuron, in the mode that its layer is in."""

    def __init__(self, parts: FFNParts, name: str, matrices: Matrices, norm: Norm):
        self.norm = norm
        self.ssd, self.activation, self.matrices = parts.ssd, parts.activation, matrices
        self.experts = 1 if parts.ssd is None else parts.ssd.num_experts
        own = {"up": parts.up, "down": parts.down} | ({} if parts.gate is None else {"gate": parts.gate})
        self.rows = {
            each: matrices.rows(f"{name}.{each}", [(module.weight, neuron_dim(module, each == "down") == 1)])
            for each, module in own.items()
        }
        biases = {"up_bias_F": parts.up.bias, "gate_bias_F": None if parts.gate is None else parts.gate.bias}
        self.biases = {each: None if bias is None else numbers(bias) for each, bias in biases.items()}
        self.bias_D = None if parts.down.bias is None else numbers(parts.down.bias)
        self.router: tuple[Tensor, Tensor] | None = None
        if parts.ssd is not None:
            self.router = (numbers(parts.ssd.router.weight), numbers(parts.ssd.router.bias))
        self.calls: dict[tuple[int, int, float, int], DecodeCall] = {}

    def __call__(self, x_TD: Tensor, add_TD: Tensor) -> Tensor:
        """Return add + FFN(norm(x))."""
        tokens = x_TD.shape[0]
        if not self.compiles(tokens):
            return self._many(self.norm(x_TD), add_TD, *self.mode())
        return self.call_for(tokens)(x_TD, add_TD)

    def compiles(self, tokens: int) -> bool:
        """Whether one compiled call is fastest for so many tokens in the mode that the layer is in."""
        return tokens <= (MOST_DENSE if self._is_whole(*self.mode()) else MOST_SPARSE)

    def call_for(self, tokens: int) -> DecodeCall:
        """Return that call."""
        key = (tokens, *self.mode(), torch.get_num_threads())
        if (call := self.calls.get(key)) is None:
            call = self.calls[key] = self._prepared(tokens, *self.mode())
        return call

    def mode(self) -> tuple[int, float]:
        """Return K, and what the shares of a token's experts must add up to; E and 1 in dense mode."""
        if self.ssd is not None and self.ssd.mode == "sparse":
            return self.ssd.experts_per_token, self.ssd.mass
        return self.experts, 1.0

    def _is_whole(self, chosen: int, mass: float) -> bool:
        return chosen == self.experts and mass == 1

    def _prepared(self, tokens: int, chosen: int, mass: float) -> DecodeCall:
        choice: Any = self.router
        if self._is_whole(chosen, mass):
            choice = torch.arange(self.experts).repeat(tokens, 1)
        call = prepare_call(
            tokens,
            self._weights({name: each.rows_ND for name, each in self.rows.items()}, self.biases),
            choice,
            self.experts,
            chosen,
            activation=self.activation,
            start_D=self.bias_D,
            scales={f"{n}_scale": each.scale_N for n, each in self.rows.items() if each.scale_N is not None},
            adds=True,
            mass=mass,
            norm=self.norm,
        )
        assert call is not None  # `has_code` said so, and the tensors are laid out for it
        return call

    def _weights(self, rows: dict[str, Tensor], biases: dict[str, Tensor | None]) -> FFNWeights:
        return FFNWeights(rows["up"], rows["down"], gate_FD=rows.get("gate"), **biases)

    def _many(self, x_TD: Tensor, add_TD: Tensor, chosen: int, mass: float) -> Tensor:
        dtype, scratch = self.matrices.many, self.matrices.scratch
        wide = {name: each.wide(dtype, scratch, name) for name, each in self.rows.items()}
        biases = {name: None if bias is None else bias.to(dtype) for name, bias in self.biases.items()}
        weights, x_wide = self._weights(wide, biases), x_TD.to(dtype).contiguous()
        if self._is_whole(chosen, mass):
            y_TD = linear(weights.activations(x_wide, self.activation), weights.down_FD.t())
            return add_TD + (y_TD if self.bias_D is None else y_TD + self.bias_D)
        assert self.router is not None
        no_ids_TK = torch.empty(0, chosen, dtype=torch.int64)
        call = ExpertCall(x_wide, weights, no_ids_TK, self.experts, self.activation, mass < 1)
        if (prefill := prepare_prefill(call, self.router, self.bias_D, mass=mass)) is not None:
            return add_TD + prefill(x_wide)
        ids_TK = top_experts(linear(x_TD, *self.router), chosen, mass)
        y_TD = expert_ffn(call._replace(expert_ids_TK=ids_TK))
        return add_TD + (y_TD if self.bias_D is None else y_TD + self.bias_D)
