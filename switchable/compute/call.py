"""One call of expert compute, and what a backend is: the interface that every way of computing it implements.

    y_t = Σ_k FFN_e(t,k)(x_t),      FFN_e being the FFN with the neurons of expert e alone

An expert's output is never scaled. `choose.py` holds the table of backends; the layer builds a call and hands it over.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.activations import activation_named


@dataclass(frozen=True)
class FFNWeights:
    """FFN(x) = act(x · upᵀ + up_bias) · down; gated: (act(x · gateᵀ + gate_bias) ⊙ (x · upᵀ + up_bias)) · down.

    Row i of every field belongs to neuron i, and expert e owns the rows e·I to (e+1)·I. The fields are *views* of the
    model's own parameters, usually transposed ones (`nn.Linear` stores `down` as [D, F], transformers' `Conv1D` stores
    `up` as [D, F]): nothing is copied, and gradients flow to the parameters.

    The bias of the output projection is not here: it is added once, outside the experts, in both modes.
    """

    up_FD: Tensor
    """What each neuron reads: row i of the input projection."""
    down_FD: Tensor
    """What each neuron writes: column i of the output projection."""
    up_bias_F: Tensor | None = None
    """Bias of the input projection."""
    gate_FD: Tensor | None = None
    """Gate projection of a gated FFN (Llama type), else None."""
    gate_bias_F: Tensor | None = None
    """Bias of the gate projection."""

    def to(self, dtype: torch.dtype) -> FFNWeights:
        """The weights in another dtype."""
        own = {name: each.to(dtype) for name, each in vars(self).items() if each is not None}
        return replace(self, **own)

    def part(self, own: slice) -> FFNWeights:
        """The weights of some neurons."""
        rest = (self.up_bias_F, self.gate_FD, self.gate_bias_F)
        others = (None if tensor is None else tensor[own] for tensor in rest)
        return FFNWeights(self.up_FD[own], self.down_FD[own], *others)

    @property
    def entrance_and_factor(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """Weight and bias of what the activation is applied to, and of what that is multiplied with in a gated FFN."""
        up = self.up_FD, self.up_bias_F
        return (up, (None, None)) if self.gate_FD is None else ((self.gate_FD, self.gate_bias_F), up)

    def activations(self, x_TD: Tensor, activation: str) -> Tensor:
        """Return act(x · upᵀ + up_bias) of all neurons; gated: act(x · gateᵀ + gate_bias) ⊙ (x · upᵀ + up_bias)."""
        act: Callable[[Tensor], Tensor] = activation_named(activation)
        up_TF = linear(x_TD, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            return act(up_TF)
        return act(linear(x_TD, self.gate_FD, self.gate_bias_F)) * up_TF

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        own = (self.up_FD, self.down_FD, self.up_bias_F, self.gate_FD, self.gate_bias_F)
        return tuple(tensor for tensor in own if tensor is not None)


class Rounded(NamedTuple):
    """The numbers of a call in the dtype that it computes in, without gradients."""

    x_TD: Tensor
    weights: FFNWeights


class ExpertCall(NamedTuple):
    """y_TD, to be computed, without the bias of the output projection."""

    x_TD: Tensor
    """The FFN's input, one row per token, any strides."""
    weights: FFNWeights
    """The FFN's, neurons in cluster order."""
    expert_ids_TK: Tensor
    """The selected experts, distinct within a row, int64 in [0, num_experts); if `ragged`, num_experts too."""
    num_experts: int
    """E; divides F."""
    activation: str
    """A name in transformers' `ACT2FN`."""
    ragged: bool = False
    """Whether tokens may have fewer than K experts: num_experts then stands for none, any number of times."""
    rounded: Rounded | None = None
    """If they are at hand: a backend need not round them once more."""

    @property
    def neurons(self) -> int:
        """I."""
        return len(self.weights.up_FD) // self.num_experts

    @property
    def learns(self) -> bool:
        """Whether anything asks for a gradient."""
        tensors = (self.x_TD, *self.weights.tensors)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@dataclass(frozen=True)
class Backend:
    """One way of computing a call."""

    name: str
    supports: Callable[[ExpertCall], str | None]
    """Returns None, or the reason why it cannot compute a call: half a sentence that follows the backend's name.
    Compiles nothing and looks at no number of a tensor."""
    run: Callable[[ExpertCall], Tensor]
    """Returns y_TD; `supports` must have returned None."""


def autocasts(call: ExpertCall) -> bool:
    """Return whether autocast decides the dtype: like `nn.Linear`, it leaves float64 alone."""
    x_TD = call.x_TD
    return torch.is_autocast_enabled(x_TD.device.type) and x_TD.dtype != torch.float64


def compute_dtype(call: ExpertCall) -> torch.dtype:
    """Return the dtype that the products of a call are computed in, as `nn.Linear` does: autocast's, or the input's."""
    return torch.get_autocast_dtype(call.x_TD.device.type) if autocasts(call) else call.x_TD.dtype


def why_not_dtype(call: ExpertCall, allowed: tuple[torch.dtype, ...]) -> str | None:
    """Return None, or why a backend that computes in the `allowed` dtypes cannot take a call."""
    given = {tensor.dtype for tensor in (call.x_TD, *call.weights.tensors)}
    if len(given) > 1 and not autocasts(call):
        return f"wants one dtype, and input and weights have {_names(given)}; convert them, or use torch.autocast"
    dtype = compute_dtype(call)
    if dtype not in allowed:
        return f"computes in {_names(allowed)} on {call.x_TD.device.type}, not in {_names([dtype])}"
    return None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
