"""SwitchableFFN: one set of weights, two ways to multiply it.

    dense:   y = down · act(up · x)                         gated: down · (act(gate · x) ⊙ (up · x))
    sparse:  y = Σ over the top-K experts e of  down_e · act(up_e · x),     up.view(E, I, D)[e] being up_e

With the neurons in cluster order the dense layer's own parameters *are* the experts: nothing is added to the model
but the router, the parameters keep their names, and "all experts selected" is the dense layer. The layer stands
where the model's FFN stood and holds that FFN's children under their old names; where the FFN has no module of its
own, `placement.py` puts the layer among its projections.

Shapes: B batch, S sequence, T = B·S tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from switchable.compute.choose import ExpertCall, FFNWeights, expert_ffn
from switchable.compute.reference import eager
from switchable.errors import InputError, divisors_near
from switchable.ffn import active_training
from switchable.ffn.families import Family, activation_name, neurons_first
from switchable.ffn.placement import project
from switchable.ffn.router import (
    Router,
    attach_loss,
    expert_mass,
    importance,
    load_balance_loss,
    router_loss,
    select,
    share_missed,
    softmax_gates,
)
from switchable.ffn.serving import Kept, dense_is_faster, few_tokens_of

OWN_ATTRIBUTES = frozenset((
    "family", "name", "act_name", "d_ff", "d_model", "num_experts", "experts_per_token", "mode", "takes_part",
    "dense_fallback", "dense_wins", "kept_call", "expert_compute", "router", "router_learns", "router_objective",
    "router_token_fraction", "router_sparse_fraction", "expert_gate", "load_balance", "activation_l1", "commitment",
    "attached_loss_weight", "multiplies_active", "active_seen", "neuron_ids_F", "router_gate_gradient", "router_noise",
    "training",
))  # fmt: skip
"""Names that no part of an FFN may have, besides those of methods; names with an underscore apart."""


class SwitchableFFN(nn.Module):
    """An FFN that multiplies all its neurons, or those of K experts per token.

    Args:
        ffn: the module that holds the projections. Is it the FFN itself, its children move here under their own
            names; is it a layer (`family.in_layer`), they stay, and `placement.put_into_layer` does the rest.
        family: what they are called.
        name: its name in the model, for messages.
        num_experts: E; must divide F.
        experts_per_token: K in sparse mode, 1 to E.

    Raises:
        InputError: E does not divide F, K is not in 1..E, the activation has no name in `ACT2FN`, or the FFN holds
            parameters besides its projections'.
    """

    mode: str
    """`"dense"` or `"sparse"`: how the layer multiplies now."""
    takes_part: bool
    """Whether `set_mode(model, "sparse")` makes this layer sparse; the first layer's activation often is not."""
    attached_loss_weight: float
    """Factor of the losses that the layer adds by itself: 1 / micro-batches where a loop adds up their gradients."""
    dense_fallback: bool
    """Whether sparse mode without gradients may multiply densely where that is faster on this machine."""
    dense_wins: dict[tuple[object, ...], bool]
    """What `serving.py` has found out about that."""
    kept_call: Kept
    """What it has looked up for a few tokens."""
    multiplies_active: bool
    """Whether training in dense mode multiplies only the active neurons, where `active_training.py` can."""
    active_seen: active_training.Seen
    """What that came to since somebody last asked."""
    neuron_ids_F: Tensor
    """Which neuron stands in each row: its row when the layer was converted. Regrouping moves neurons; whoever
    compares them over time needs to know which is which."""

    def __init__(
        self, ffn: nn.Module, family: Family, name: str, num_experts: int, experts_per_token: int
    ) -> None:
        super().__init__()
        self.family, self.name = family, name
        if family.in_layer:
            self._layer = (ffn,)  # in a tuple: a reference, not a child
            self.moved_activation = ffn.get_submodule(family.activation)
            if family.hidden_dropout is not None:
                self._hidden_dropout = float(getattr(ffn, family.hidden_dropout))
        else:
            _refuse_own_parameters(ffn, name)
            for child_name, child in ffn.named_children():
                if child_name in OWN_ATTRIBUTES or hasattr(type(self), child_name):
                    raise InputError(
                        f"{name} has a part called {child_name!r}, a name that we need there; describe it with "
                        "Family(..., in_layer=True), which leaves the FFN's own module in place"
                    )
                self.add_module(child_name, child)
        activation = activation_name(self.activation_module)
        if activation is None:
            raise InputError(
                f"the activation of {name}, {type(self.activation_module).__name__}, has parameters of its own or no "
                "name in transformers' ACT2FN; use e.g. nn.ReLU"
            )
        self.act_name = activation
        up_FD = self.weights.up_FD
        self.d_ff, self.d_model = up_FD.shape
        self.neuron_ids_F = torch.arange(self.d_ff, device="cpu")
        if num_experts < 1 or self.d_ff % num_experts:
            allowed = ", ".join(str(d) for d in divisors_near(self.d_ff, num_experts))
            raise InputError(
                f"num_experts={num_experts} does not divide d_ff={self.d_ff} of {name}; use one of {allowed}"
            )
        self.num_experts = num_experts
        self.set_experts_per_token(experts_per_token)
        self.mode = "dense"
        self.takes_part = True
        self.dense_fallback = False
        self.dense_wins: dict[tuple[object, ...], bool] = {}
        self.kept_call = Kept()
        self.expert_compute = "eager"
        self.router = Router(self.d_model, num_experts, device=up_FD.device)
        self.router.initialise(self.reads_FD)
        self.router_learns = True
        self.router_objective = "mass"
        self.router_token_fraction = 1.0
        self.router_sparse_fraction = 0.0
        self.router_gate_gradient = False
        self.router_noise = 0.0
        self.attached_loss_weight = 1.0
        self.expert_gate = "unit"
        self.load_balance = 0.0
        self.activation_l1 = 0.0
        self.commitment = 0.0
        self.multiplies_active = False
        self.active_seen = active_training.Seen()

    def _part(self, path: str) -> nn.Module:
        """Return a module by its path in the family's row."""
        home = self._layer[0] if self.family.in_layer else self
        child = home._modules.get(path)  # get_submodule takes 5 µs, and decoding asks seven times per layer
        return home.get_submodule(path) if child is None else child

    @property
    def holders(self) -> tuple[nn.Module, ...]:
        """The modules that hold the parameters: this one, and the layer that the projections stayed in."""
        return (self, *self._layer) if self.family.in_layer else (self,)

    @property
    def up_projection(self) -> nn.Linear:
        """The input projection (`nn.Linear` or `Conv1D`)."""
        return cast(nn.Linear, self._part(self.family.up))

    @property
    def gate_projection(self) -> nn.Linear | None:
        """The projection under the activation of a gated FFN."""
        return None if self.family.gate is None else cast(nn.Linear, self._part(self.family.gate))

    @property
    def down_projection(self) -> nn.Linear:
        """The output projection (`nn.Linear` or `Conv1D`)."""
        return cast(nn.Linear, self._part(self.family.down))

    @property
    def activation_module(self) -> nn.Module:
        """The activation, as the model calls it."""
        return self.moved_activation if self.family.in_layer else self._part(self.family.activation)

    @property
    def hidden_dropout(self) -> float:
        """Probability of the dropout between the projections."""
        if self.family.hidden_dropout is None:
            return 0.0
        if self.family.in_layer:
            return self._hidden_dropout
        return float(cast(nn.Dropout, self._part(self.family.hidden_dropout)).p)

    @property
    def weights(self) -> FFNWeights:
        """The parameters, neuron by neuron (views)."""
        gate = self.gate_projection
        return FFNWeights(
            up_FD=neurons_first(self.up_projection, output=False),
            down_FD=neurons_first(self.down_projection, output=True),
            up_bias_F=self.up_projection.bias,
            gate_FD=None if gate is None else neurons_first(gate, output=False),
            gate_bias_F=None if gate is None else gate.bias,
        )

    @property
    def reads_FD(self) -> Tensor:
        """What decides whether a neuron fires: its row of the input projection, of a gated FFN that of the gate."""
        return neurons_first(self.gate_projection or self.up_projection, output=False)

    def set_experts_per_token(self, experts_per_token: int) -> None:
        """Set K.

        Raises:
            InputError: K is not in 1..E.
        """
        if not 1 <= experts_per_token <= self.num_experts:
            raise InputError(
                f"experts_per_token={experts_per_token} is not possible with the {self.num_experts} experts of "
                f"{self.name}; use 1 to {self.num_experts}"
            )
        self.experts_per_token = experts_per_token

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D] in the current mode."""
        sparse = self.mode == "sparse" and not (self.dense_fallback and dense_is_faster(self, hidden_states))
        y = self._sparse(hidden_states) if sparse else self._dense(hidden_states)
        if self.family.dropout:
            dropout = self._part(self.family.dropout)
            if dropout.training:  # decoding feels a call that does nothing
                y = dropout(y)
        return y

    def activations(self, x: Tensor) -> Tensor:
        """Return the neurons' activations, act(up · x) or act(gate · x) ⊙ (up · x), of shape [..., F].

        A neuron is active where its activation is not zero.
        """
        gate = self.gate_projection
        hidden: Tensor = self.activation_module(project(gate or self.up_projection, x))
        return hidden if gate is None else hidden * project(self.up_projection, x)

    def write(self, hidden: Tensor) -> Tensor:
        """Return the FFN's output for activations [..., F]: down · hidden, and its bias."""
        dtype = self.down_projection.weight.dtype  # T5 keeps the output projection alone in float32
        if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(dtype)
        return project(self.down_projection, hidden)

    def _dense(self, x_BSD: Tensor) -> Tensor:
        if self.multiplies_active and active_training.applies(self, x_BSD):
            return active_training.forward(self, x_BSD)
        hidden_BSF = self.activations(x_BSD)
        dropout = self.hidden_dropout
        y_BSD = self.write(nnf.dropout(hidden_BSF, dropout, self.training) if dropout else hidden_BSF)
        if not (self.training and torch.is_grad_enabled()):
            return y_BSD
        if self.router_learns:
            every = active_training.stride(self.router_token_fraction)
            seen, hidden = x_BSD[..., ::every, :].detach(), hidden_BSF[..., ::every, :]
            y_BSD = self.attach(y_BSD, self._router_loss(seen, hidden.detach()))
            if self.commitment and self.takes_part:
                y_BSD = self.attach(y_BSD, self.commitment * self._share_missed(seen, hidden))
        if self.activation_l1:
            y_BSD = self.attach(y_BSD, self.activation_l1 * hidden_BSF.abs().sum(dim=-1).mean())
        return y_BSD

    def attach(self, y: Tensor, loss: Tensor) -> Tensor:
        """Return y; whatever is learned from it, the loss is learned besides."""
        return attach_loss(y, self.attached_loss_weight * loss)

    def _sparse(self, x_BSD: Tensor) -> Tensor:
        few_BSD = few_tokens_of(self, x_BSD)
        if few_BSD is not None:
            return few_BSD
        x_TD = x_BSD.reshape(-1, self.d_model)
        # Detached: the output depends on x through the experts alone, the choice being piecewise constant. So the
        # gradient of x is that of the function computed, and with all experts on that of the dense layer. Not so with
        # softmax gates: the output depends on x through them too.
        softmax = self.expert_gate == "softmax"
        scores_TE = self.router(x_TD if softmax else x_TD.detach())
        if not self.router_gate_gradient and not softmax:
            scores_TE = scores_TE.detach()
        gates_TK: Tensor | None
        if softmax:
            ids_TK, gates_TK = softmax_gates(scores_TE, self.experts_per_token)
        else:
            noise = self.router_noise if self.training and torch.is_grad_enabled() else 0.0
            ids_TK, gates_TK = select(scores_TE, self.experts_per_token, noise)
        y_TD = self._experts(x_TD, ids_TK, gates_TK)
        if self.load_balance and self.training and torch.is_grad_enabled():
            y_TD = self.attach(y_TD, self.load_balance * load_balance_loss(scores_TE, ids_TK))
        if self.down_projection.bias is not None:
            y_TD = y_TD + self.down_projection.bias.to(y_TD.dtype)
        y_BSD = y_TD.view(x_BSD.shape)
        learns = self.router_learns and not softmax and self.training and torch.is_grad_enabled()
        if learns and self.router_sparse_fraction:
            # A few tokens compute all neurons, forward only, so that the router keeps up between dense steps.
            seen = x_BSD[..., :: active_training.stride(self.router_sparse_fraction), :].detach().contiguous()
            with torch.no_grad():
                hidden = self.activations(seen)
            y_BSD = self.attach(y_BSD, self._router_loss(seen, hidden))
        return y_BSD

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor | None) -> Tensor:
        """Return what the experts write, without the bias of the output projection."""
        weights, dtype = self.weights, self.down_projection.weight.dtype
        if dtype != x_TD.dtype and not torch.is_autocast_enabled(x_TD.device.type):
            weights = replace(weights, down_FD=weights.down_FD.to(x_TD.dtype))
        if self.training and self.hidden_dropout:
            # Only the reference drops out between the projections.
            call = ExpertCall(x_TD, weights, ids_TK, gates_TK, self.num_experts, self.act_name)
            return eager(call, self.hidden_dropout).to(dtype)
        return expert_ffn(
            x_TD,
            weights,
            ids_TK,
            gates_TK,
            num_experts=self.num_experts,
            activation=self.act_name,
            unit_gates=self.expert_gate == "unit",
            implementation=self.expert_compute,
        )

    def _router_loss(self, x_BSD: Tensor, hidden_BSF: Tensor) -> Tensor:
        """Return the router's loss on tokens and what all neurons make of them, both detached."""
        with torch.no_grad():
            wanted_TE = importance(
                hidden_BSF.reshape(-1, self.d_ff),
                self.weights.down_FD,
                self.num_experts,
                self.experts_per_token,
                self.router_objective,
            )
        return router_loss(self.router(x_BSD.reshape(-1, self.d_model)), wanted_TE)

    def _share_missed(self, x_BSD: Tensor, hidden_BSF: Tensor) -> Tensor:
        """Return the share of the activation mass that sparse mode would leave out, through which neurons learn."""
        with torch.no_grad():
            ids_TK, _ = select(self.router(x_BSD.reshape(-1, self.d_model)), self.experts_per_token)
        down_FD = self.weights.down_FD.detach()
        mass_TE = expert_mass(hidden_BSF.reshape(-1, self.d_ff), down_FD, self.num_experts)
        return share_missed(mass_TE, ids_TK)

    def extra_repr(self) -> str:
        """Say mode, K and E, as in `mode=sparse, experts=6/32`."""
        return f"mode={self.mode}, experts={self.experts_per_token}/{self.num_experts}"


def _refuse_own_parameters(ffn: nn.Module, name: str) -> None:
    own = [n for n, _ in (*ffn.named_parameters(recurse=False), *ffn.named_buffers(recurse=False))]
    if own:
        raise InputError(
            f"{name} ({type(ffn).__name__}) holds tensors of its own ({', '.join(own)}) besides its projections; such "
            "an FFN cannot be made switchable"
        )
