"""What a switchable FFN is, besides being a module: its settings, its state, and its weights neuron by neuron.

A `SwitchableFFN` stands in somebody else's model and holds somebody else's children under their own names. So all that
we need has one name there, `layer.ssd`, besides the `router`, which must be a child to be trained and saved.

    settings    fixed when the model is converted
    state       the mode and what else a schedule changes between steps

Shapes: B batch, S sequence, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

import operator
import uuid
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from switchable.compute.activations import activation_name, activation_named
from switchable.compute.call import FFNWeights
from switchable.errors import InputError, divisors_near
from switchable.ffn.attached import LossScale
from switchable.ffn.families import Family, halves, neurons_first
from switchable.ffn.placement import PerThread, project
from switchable.ffn.router import Router
from switchable.options import checked
from switchable.settings import SwitchConfig

RESERVED = ("ssd", "router")
"""Names that no part of an FFN may have, besides those that `nn.Module` has."""


@dataclass(frozen=True)
class FFNSettings:
    """What does not change after conversion."""

    family: Family
    name: str
    """Of the FFN in the model."""
    activation: str
    """Its name in transformers' `ACT2FN`."""
    d_model: int
    d_ff: int
    config: SwitchConfig
    """With a value for every setting."""


def facts_of(ffn: nn.Module, family: Family, name: str) -> tuple[str, int, int]:
    """Return the activation's name in `ACT2FN`, D and F of the FFN in a module; raise InputError if it has no name."""
    activation = family.activation_fn
    if family.activation is not None:
        act = ffn.get_submodule(family.activation)
        activation = activation_name(act)
    if activation is None:
        raise InputError(
            f"the activation of {name}, {type(act).__name__}, has parameters of its own or no name in transformers' "
            "ACT2FN; use e.g. nn.ReLU"
        )
    rows, d_model = neurons_first(cast(nn.Linear, ffn.get_submodule(family.up)), output=False).shape
    return activation, d_model, rows if family.fused is None else rows // 2


def settings_of(ffn: nn.Module, family: Family, name: str, config: SwitchConfig) -> FFNSettings:
    """Return an FFN's settings, from a config with every value; InputError as `facts_of`, or if E does not divide F."""
    activation, d_model, d_ff = facts_of(ffn, family, name)
    if d_ff % config.num_experts:
        allowed = ", ".join(str(d) for d in divisors_near(d_ff, config.num_experts))
        raise InputError(
            f"num_experts={config.num_experts} does not divide d_ff={d_ff} of {name}; use one of {allowed}"
        )
    return FFNSettings(family, name, activation, d_model, d_ff, config)


@dataclass
class ActiveCount:
    """How many activations were not zero, over all tokens and steps since somebody last asked."""

    entries: int = 0
    tokens: int = 0

    def take(self, d_ff: int) -> float | None:
        """Return the share of the activations that were not zero, and start anew; None if no token was counted."""
        share = self.entries / (self.tokens * d_ff) if self.tokens else None
        self.entries = self.tokens = 0
        return share


COPIES: weakref.WeakSet[SSD] = weakref.WeakSet()
"""Those alive that were made from another, by `copy.deepcopy` or pickle."""


class SSD:
    """Settings, state and weights of one switchable FFN, the `layer` that has this as its `ssd`.

    `ffn` holds the projections: the FFN's own module, whose children `layer` has taken over, or the model's layer
    (`family.in_layer`), where they stay.
    """

    def __init__(self, layer: nn.Module, ffn: nn.Module, settings: FFNSettings) -> None:
        self.settings = settings
        self.name, self.num_experts = settings.name, settings.config.num_experts
        self.d_model, self.d_ff = settings.d_model, settings.d_ff
        self._layer, self._home = layer, ffn if settings.family.in_layer else layer
        # Behind the switchable FFN the layer's own activation and dropout are put out of use (`placement.py`).
        self._activation = _activation_of(ffn, settings.family)
        self.activation_kind = type(
            self._activation or ffn.get_submodule(cast(str, settings.family.activation))
        )
        """The class of the activation that sparse mode computes."""
        self._dropout = _dropout_of_layer(ffn, settings.family)
        self.own_forwards: frozenset[Any] = frozenset()
        """Forwards of the projections' classes that multiply by the weight and add the bias, as `nn.Linear`'s."""
        self.mode = "dense"
        """`"dense"` or `"sparse"`: how the layer multiplies now."""
        self.takes_part = True
        """Whether `set_mode(model, "sparse")` makes this layer sparse; the first layer's activation often is not."""
        self.why_dense = ""
        """What keeps the layer out of sparse mode, if it does not take part and this is known."""
        self.set_experts_per_token(settings.config.experts_per_token)
        self.mass = 1.0
        """Below 1, a token computes the fewest of its K experts whose shares, as the router estimates them, add up to
        this part of its activation mass (`compute/cpu/topk.py`)."""
        self.estimates = False
        """Whether sparse steps of training choose experts by products in 8 bits, without the router."""
        self.router_learns = not settings.config.never_sparse
        """Whether the router is trained in steps with gradients."""
        self.multiplies_active = False
        """Whether training in dense mode multiplies only active neurons, where `active_training.py` can."""
        self.activation_ratio = 0.0
        """The share of active neurons that was last measured, by which it decides in which precisions that pays."""
        self.active_count = ActiveCount()
        """What that came to."""
        self.activation_l1 = settings.config.activation_l1
        """Penalty on activations, in nats per unit."""
        self.loss_scale = LossScale()
        self.lineage = uuid.uuid4().hex
        """The same in a copy (`copy.deepcopy`), another in any other layer."""
        """The factor of the losses that the layer adds."""
        self.neuron_ids_F = torch.arange(settings.d_ff, device="cpu")
        """Which neuron stands in each row: its row when the layer was converted. Regrouping moves neurons; whoever
        compares them over time needs to know which is which."""
        self.call_cache = PerThread()
        """What `one_call.py` last prepared."""

    def set_experts_per_token(self, experts_per_token: int) -> None:
        """Set K; raise InputError unless it is a whole number in 1..E."""
        self.experts_per_token = self.checked_experts_per_token(experts_per_token)

    def checked_experts_per_token(self, experts_per_token: int) -> int:
        """Return K; raise InputError unless it is a whole number in 1..E."""
        return int(checked("experts_per_token", experts_per_token, int, least=1, most=self.num_experts))

    def part(self, path: str) -> nn.Module:
        """Return a module of the FFN by its path in the family's row."""
        child = self._home._modules.get(path)  # get_submodule takes 5 µs, seven times a layer
        return self._home.get_submodule(path) if child is None else child

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        COPIES.add(self)

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        """The modules that hold the parameters: the switchable FFN, and the layer that the projections stayed in."""
        return (self._layer,) if self._home is self._layer else (self._layer, self._home)

    @property
    def router(self) -> Router:
        """The layer's router."""
        return cast(Router, self._layer._modules["router"])

    @property
    def up_projection(self) -> nn.Linear:
        """The input projection (`nn.Linear` or `Conv1D`)."""
        return cast(nn.Linear, self.part(self.settings.family.up))

    @property
    def gate_projection(self) -> nn.Linear | None:
        """The projection under the activation of a gated FFN."""
        gate = self.settings.family.gate
        return None if gate is None else cast(nn.Linear, self.part(gate))

    @property
    def down_projection(self) -> nn.Linear:
        """The output projection (`nn.Linear` or `Conv1D`)."""
        return cast(nn.Linear, self.part(self.settings.family.down))

    @property
    def activation(self) -> nn.Module:
        """The activation's module."""
        return self._activation or self.part(cast(str, self.settings.family.activation))

    @property
    def projections(self) -> list[tuple[str, nn.Linear]]:
        """The projections by their paths, in the order in which they are called."""
        return [(path, cast(nn.Linear, self.part(path))) for path in self.settings.family.projections]

    @property
    def called(self) -> list[tuple[str, nn.Module]]:
        """What dense mode calls, each by its path: projections and activation."""
        return [*self.projections, (self.settings.family.activation or "", self.activation)]

    @property
    def hidden_dropout(self) -> float:
        """Probability of the dropout between the projections."""
        if self._dropout is not None:
            return self._dropout
        name = self.settings.family.hidden_dropout
        return 0.0 if name is None else float(cast(nn.Dropout, self.part(name)).p)

    @property
    def weights(self) -> FFNWeights:
        """The parameters, neuron by neuron (views)."""
        up, gate, fused = self.up_projection, self.gate_projection, self.settings.family.fused
        up_FD, gate_FD = neurons_first(up, output=False), None
        up_bias_F: Tensor | None = up.bias
        gate_bias_F: Tensor | None = None
        if fused is not None:
            gate_FD, up_FD = halves(up_FD, fused, 0)
            if up_bias_F is not None:
                gate_bias_F, up_bias_F = halves(up_bias_F, fused, 0)
        elif gate is not None:
            gate_FD, gate_bias_F = neurons_first(gate, output=False), gate.bias
        down_FD = neurons_first(self.down_projection, output=True)
        return FFNWeights(up_FD, down_FD, up_bias_F, gate_FD, gate_bias_F)

    @property
    def reads_FD(self) -> Tensor:
        """What decides whether a neuron fires: its row of the input projection, of a gated FFN that of the gate."""
        weights = self.weights
        return weights.up_FD if weights.gate_FD is None else weights.gate_FD

    def activations(self, x: Tensor) -> Tensor:
        """Return the neurons' activations, act(up · x) or act(gate · x) ⊙ (up · x), of shape [..., F].

        A neuron is active where its activation is not zero.
        """
        gate = self.gate_projection
        before = project(gate or self.up_projection, x)
        if gate is None:
            return cast(Tensor, self.activation(before))
        if self.settings.family.fused is not None:
            before, up = halves(before, self.settings.family.fused, -1)
            return cast(Tensor, self.activation(before)) * up
        return cast(Tensor, self.activation(before)) * project(self.up_projection, x)

    def write(self, hidden: Tensor) -> Tensor:
        """Return the FFN's output for activations [..., F]: down · hidden, and its bias."""
        dtype = self.down_projection.weight.dtype  # T5 keeps the output projection alone in float32
        differs = hidden.dtype != dtype and not self.own_forwards
        if differs and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(dtype)
        return project(self.down_projection, hidden)

    @property
    def two_tokens_TD(self) -> Tensor:
        """Two inputs, always the same, on which it shows whether the FFN computes what it did."""
        weight = self.up_projection.weight
        return torch.linspace(-1, 1, 2 * self.d_model).sin().view(2, -1).to(weight.device, weight.dtype)


def _activation_of(ffn: nn.Module, family: Family) -> nn.Module | None:
    """Return the activation, or None where its module stays among the FFN's children."""
    if family.activation is None:
        return activation_named(cast(str, family.activation_fn))
    return ffn.get_submodule(family.activation) if family.in_layer else None


def _dropout_of_layer(ffn: nn.Module, family: Family) -> float | None:
    """Return the probability of a dropout that the switchable FFN takes over from a layer, or None."""
    if not family.in_layer or family.hidden_dropout is None:
        return None
    dropout = operator.attrgetter(family.hidden_dropout)(ffn)
    return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout)
