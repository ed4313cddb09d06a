"""SwitchableFFN: one set of weights, two ways to multiply it.

    dense:   y = down · act(up · x)
    sparse:  y = Σ over the top-K experts e of  down_e · act(up_e · x),     up.view(E, I, D)[e] being up_e

With the neurons in cluster order the dense layer's own parameters *are* the experts: nothing is added to the model
but the router, the parameters keep their names, and "all experts selected" is the dense layer. The layer stands
where the model's FFN stood and holds that FFN's children under their old names.

Shapes: B batch, S sequence, T = B·S tokens, D d_model, F d_ff, E experts, K experts per token.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from switchable.errors import InputError, divisors_near
from switchable.ffn.experts import FFNWeights, expert_ffn
from switchable.ffn.experts.autotune import Shape, resolve
from switchable.ffn.families import Family, activation_name, neurons_first
from switchable.ffn.router import Router, attach_loss, expert_mass, router_loss, select


class SwitchableFFN(nn.Module):
    """An FFN that multiplies all its neurons, or those of K experts per token.

    Args:
        ffn: the model's FFN module; its children move here under their own names.
        family: what its children are called.
        name: its name in the model, for messages.
        num_experts: E; must divide F.
        experts_per_token: K in sparse mode, 1 to E.

    Raises:
        InputError: E does not divide F, K is not in 1..E, or the activation has no name in `ACT2FN`.
    """

    mode: str
    """`"dense"` or `"sparse"`: how the layer multiplies now."""
    takes_part: bool
    """Whether `set_mode(model, "sparse")` makes this layer sparse; the first layer's activation often is not."""
    dense_fallback: bool
    """Whether sparse mode without gradients may multiply densely where that is faster on this machine."""
    neuron_ids_F: Tensor
    """Which neuron stands in each row: its row when the layer was converted. Regrouping moves neurons; whoever
    compares them over time needs to know which is which."""

    def __init__(
        self, ffn: nn.Module, family: Family, name: str, num_experts: int, experts_per_token: int
    ) -> None:
        super().__init__()
        self.family, self.name = family, name
        for child_name, child in ffn.named_children():
            self.add_module(child_name, child)
        activation = activation_name(getattr(ffn, family.activation))
        if activation is None:
            raise InputError(
                f"the activation of {name} has no name in transformers' ACT2FN; use e.g. nn.ReLU"
            )
        self.activation = activation
        up_FD = self.weights.up_FD
        self.d_ff, self.d_model = up_FD.shape
        self.neuron_ids_F = torch.arange(self.d_ff)
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
        self.expert_compute = "eager"
        self.router = Router(self.d_model, num_experts, device=up_FD.device)
        self.router.initialise(up_FD)
        self.router_learns = True
        self.router_token_fraction = 1.0

    @property
    def up(self) -> nn.Linear:
        """The input projection (`nn.Linear` or `Conv1D`)."""
        return cast(nn.Linear, self.get_submodule(self.family.up))

    @property
    def down(self) -> nn.Linear:
        """The output projection (`nn.Linear` or `Conv1D`)."""
        return cast(nn.Linear, self.get_submodule(self.family.down))

    @property
    def weights(self) -> FFNWeights:
        """The parameters, neuron by neuron (views)."""
        return FFNWeights(
            up_FD=neurons_first(self.up, output=False),
            down_FD=neurons_first(self.down, output=True),
            up_bias_F=self.up.bias,
        )

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
        sparse = self.mode == "sparse" and not (self.dense_fallback and self._dense_is_faster(hidden_states))
        y = self._sparse(hidden_states) if sparse else self._dense(hidden_states)
        if self.family.dropout:
            y = self.get_submodule(self.family.dropout)(y)
        return y

    def activations(self, x: Tensor) -> Tensor:
        """Return act(up · x), of shape [..., F]."""
        hidden: Tensor = self.get_submodule(self.family.activation)(self.up(x))
        return hidden

    def _dense(self, x_BSD: Tensor) -> Tensor:
        hidden_BSF = self.activations(x_BSD)
        y_BSD: Tensor = self.down(hidden_BSF)
        if self.router_learns and self.training and torch.is_grad_enabled():
            y_BSD = attach_loss(y_BSD, self._router_loss(x_BSD.detach(), hidden_BSF.detach()))
        return y_BSD

    def _sparse(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, self.d_model)
        # Detached: the output depends on x through the experts alone, the choice being piecewise constant. So the
        # gradient of x is that of the function computed, and with all experts on that of the dense layer.
        ids_TK, gates_TK = select(self.router(x_TD.detach()), self.experts_per_token)
        y_TD = expert_ffn(
            x_TD,
            self.weights,
            ids_TK,
            gates_TK,
            num_experts=self.num_experts,
            activation=self.activation,
            unit_gates=True,
            implementation=self.expert_compute,
        )
        if self.down.bias is not None:
            y_TD = y_TD + self.down.bias.to(y_TD.dtype)
        return y_TD.view(x_BSD.shape)

    def _dense_is_faster(self, x_BSD: Tensor) -> bool:
        """Whether this machine's table says so; always False where gradients are wanted."""
        if torch.is_grad_enabled():
            return False
        shape = Shape(
            tokens=x_BSD.numel() // self.d_model,
            d_model=self.d_model,
            d_ff=self.d_ff,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            activation=self.activation,
            dtype=x_BSD.dtype,
            device=x_BSD.device.type,
            training=False,
        )
        return resolve(shape) == "dense"

    def _router_loss(self, x_BSD: Tensor, hidden_BSF: Tensor) -> Tensor:
        every = max(1, round(1.0 / self.router_token_fraction))
        x_TD = x_BSD.reshape(-1, self.d_model)[::every]
        with torch.no_grad():
            hidden_TF = hidden_BSF.reshape(-1, self.d_ff)[::every]
            mass_TE = expert_mass(hidden_TF, self.weights.down_FD, self.num_experts)
        return router_loss(self.router(x_TD), mass_TE)

    def extra_repr(self) -> str:
        """Say mode, K and E, as in `mode=sparse, experts=6/32`."""
        return f"mode={self.mode}, experts={self.experts_per_token}/{self.num_experts}"
