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

from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from switchable.compute.call import ExpertCall, Rounded
from switchable.compute.choose import expert_ffn
from switchable.compute.cpu.topk import top_experts
from switchable.compute.eager import eager
from switchable.compute.estimate import estimated_mass, expert_mass
from switchable.compute.reference import reference
from switchable.errors import InputError
from switchable.ffn import active_training
from switchable.ffn.attached import penalise, teach
from switchable.ffn.description import SavedRouter
from switchable.ffn.one_call import in_one_call
from switchable.ffn.plain import check_plain
from switchable.ffn.router import Router, stride
from switchable.ffn.ssd import RESERVED, SSD, FFNSettings

SPARSE_TOKEN_FRACTION = 1 / 16
"""Fraction of a sparse step's tokens that train the router. All neurons are computed for them, forward only."""
ESTIMATED_TOKEN_FRACTION = 1 / 8
"""The same where the mass of all tokens is estimated anyway."""


class SwitchableFFN(nn.Module):
    """An FFN that multiplies all its neurons, or those of K experts per token.

    `ffn` holds the projections. If it is the FFN itself, its children move here under their own names; if it is a
    layer (`family.in_layer`), they stay, and `placement.put_into_layer` does the rest.

    Raises:
        InputError: the FFN holds parameters besides its projections'.
    """

    has_dense_mode: ClassVar[bool] = True
    """Whether dense mode computes what sparse mode does with all experts."""
    router_passes: ClassVar[float] = 1.0
    """Passes through the router in a sparse step, each of 2·D·E FLOPs per token, apart from learning the mass."""

    ssd: SSD
    router: Router

    def __init__(self, ffn: nn.Module, settings: FFNSettings) -> None:
        super().__init__()
        if not settings.family.in_layer:
            self._take_over(ffn, settings.name)
        self.ssd = SSD(self, ffn, settings)
        self.router = SavedRouter(self.ssd)

    def _take_over(self, ffn: nn.Module, name: str) -> None:
        """Take an FFN's children under their own names."""
        own = [n for n, _ in (*ffn.named_parameters(recurse=False), *ffn.named_buffers(recurse=False))]
        if own:
            raise InputError(
                f"{name} ({type(ffn).__name__}) holds tensors of its own ({', '.join(own)}) besides its projections; "
                "such an FFN cannot be made switchable"
            )
        for child_name, child in ffn.named_children():
            if child_name in RESERVED or hasattr(type(self), child_name):
                raise InputError(
                    f"{name} has a part called {child_name!r}, a name that we need there; describe it with "
                    "Family(..., in_layer=True), which leaves the FFN's own module in place"
                )
            self.add_module(child_name, child)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D] in the current mode."""
        y = self._sparse(hidden_states) if self.ssd.mode == "sparse" else self._dense(hidden_states)
        if name := self.ssd.settings.family.dropout:
            dropout = self.ssd.part(name)
            if dropout.training:  # decoding feels a call that does nothing
                y = dropout(y)
        return y

    def _dense(self, x_BSD: Tensor) -> Tensor:
        ssd, trains = self.ssd, self._trains
        fraction = ssd.settings.config.router_token_fraction
        if trains and active_training.applies(ssd, x_BSD):
            y_TD, mass_TE = active_training.forward(ssd, x_BSD)
            y_BSD = self._whole(y_TD, x_BSD)
            return y_BSD if mass_TE is None else self._teach_some(y_BSD, x_BSD, mass_TE, fraction)
        hidden_BSF = kept_BSF = ssd.activations(x_BSD)
        if trains and ssd.activation_l1:
            kept_BSF = penalise(kept_BSF, ssd.activation_l1, ssd.loss_scale.now)
        if dropout := ssd.hidden_dropout:
            kept_BSF = nnf.dropout(kept_BSF, dropout, self.training)
        y_BSD = ssd.write(kept_BSF)
        if trains and ssd.router_learns:
            every = stride(fraction)
            y_BSD = self._taught(y_BSD, x_BSD[..., ::every, :], hidden_BSF[..., ::every, :])
        return y_BSD

    @property
    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _sparse(self, x_BSD: Tensor) -> Tensor:
        # A baseline that scales its experts' outputs goes step by step.
        if self.has_dense_mode and (done_BSD := in_one_call(self.ssd, self.training, x_BSD)) is not None:
            return done_BSD
        if not torch.compiler.is_compiling():  # `set_mode` has looked already
            check_plain(self.ssd)
        if self.ssd.estimates and self._trains:
            return self._sparse_by_estimate(x_BSD)
        ssd, x_TD = self.ssd, x_BSD.reshape(-1, self.ssd.d_model)
        rounded = self._rounded(x_TD)
        y_BSD = self._whole(self._mixed(x_TD, rounded), x_BSD)
        if ssd.router_learns and self._trains:
            # A few tokens compute all neurons, forward only, so that the router keeps up between dense steps.
            every = stride(SPARSE_TOKEN_FRACTION)
            seen = x_BSD[..., ::every, :].detach().contiguous()
            with torch.no_grad():
                if rounded is None:
                    hidden = ssd.activations(seen)
                else:
                    own = rounded.x_TD.view(x_BSD.shape)[..., ::every, :].contiguous()
                    hidden = rounded.weights.activations(own, ssd.settings.activation)
            y_BSD = self._taught(y_BSD, seen, hidden)
        return y_BSD

    def _rounded(self, x_TD: Tensor) -> Rounded | None:
        """Round input and weights as autocast does, once for the experts, their choice and what the router learns."""
        half = x_TD.is_cpu and x_TD.dtype != torch.float64 and torch.is_autocast_enabled("cpu")
        if not (half and self._trains and self.ssd.router_learns) or self.ssd.own_forwards:
            return None
        dtype = torch.get_autocast_dtype("cpu")
        with torch.no_grad():
            return Rounded(x_TD.to(dtype), self.ssd.weights.to(dtype))

    def _sparse_by_estimate(self, x_BSD: Tensor) -> Tensor:
        """Return the output of the experts that have most mass by products in 8 bits; the router learns that mass."""
        ssd = self.ssd
        mass_TE = estimated_mass(
            x_BSD.detach().reshape(-1, ssd.d_model), ssd.weights, ssd.settings.activation, ssd.num_experts
        )
        ids_TK = _chosen(ssd, mass_TE, 1.0)
        y_BSD = self._whole(self._experts(x_BSD.reshape(-1, ssd.d_model), ids_TK), x_BSD)
        if not ssd.router_learns:
            return y_BSD
        return self._teach_some(y_BSD, x_BSD, mass_TE, ESTIMATED_TOKEN_FRACTION)

    def _whole(self, y_TD: Tensor, x_BSD: Tensor) -> Tensor:
        """Return what the experts write, with the bias of the output projection, in the shape of the input."""
        if (bias := self.ssd.down_projection.bias) is not None:
            y_TD = y_TD.add_(bias.to(y_TD.dtype))  # new memory: nobody else has it
        return y_TD.view(x_BSD.shape)

    def _mixed(self, x_TD: Tensor, rounded: Rounded | None = None, /) -> Tensor:
        """Return the sum of what each token's experts write, without the bias of the output projection.

        The output depends on x through the experts alone: which ones are chosen is piecewise constant. So the gradient
        of x is that of the function computed, and with all experts on that of the dense layer.
        """
        with torch.no_grad():
            seen_TD = x_TD.detach() if rounded is None else rounded.x_TD
            ids_TK = _chosen(self.ssd, self.router(seen_TD), self.ssd.mass)
        return self._experts(x_TD, ids_TK, rounded)

    def _experts(self, x_TD: Tensor, ids_TK: Tensor, rounded: Rounded | None = None) -> Tensor:
        ssd = self.ssd
        weights, dtype = ssd.weights, ssd.down_projection.weight.dtype
        if dtype != x_TD.dtype and not torch.is_autocast_enabled(x_TD.device.type):
            weights = weights.to(x_TD.dtype)
        call = ExpertCall(
            x_TD, weights, ids_TK, ssd.num_experts, ssd.settings.activation, ssd.mass < 1, rounded
        )
        if self.training and ssd.hidden_dropout:
            y_TD = reference(call, ssd.hidden_dropout)  # the only one that drops out between the projections
            return y_TD if ssd.own_forwards else y_TD.to(dtype)
        return expert_ffn(call, ssd.settings.config.backend)

    def _taught(self, y: Tensor, x_BSD: Tensor, hidden_BSF: Tensor) -> Tensor:
        """Return y; whatever is learned from it, the router learns from tokens and what all neurons make of them."""
        ssd = self.ssd
        with torch.no_grad():
            mass_TE = expert_mass(hidden_BSF.reshape(-1, ssd.d_ff), ssd.weights.down_FD, ssd.num_experts)
        return self._teach(y, x_BSD, mass_TE)

    def _teach_some(self, y: Tensor, x_BSD: Tensor, mass_TE: Tensor, fraction: float) -> Tensor:
        """Do what `_teach` does for a fraction of the tokens, given the mass of all."""
        every = stride(fraction)
        mass_BSE = mass_TE.view(*x_BSD.shape[:-1], -1)
        return self._teach(y, x_BSD[..., ::every, :], mass_BSE[..., ::every, :].flatten(0, -2))

    def _teach(self, y: Tensor, x_BSD: Tensor, mass_TE: Tensor) -> Tensor:
        """Return y; whatever is learned from it, the router learns the mass of tokens."""
        scores_TE = self.router(x_BSD.detach().reshape(-1, self.ssd.d_model))
        return teach(y, scores_TE, mass_TE, self.ssd.loss_scale.now, self.ssd.loss_scale.routers)

    def extra_repr(self) -> str:
        """Say mode, K and E, and the mass, as in `mode=sparse, experts=6/32, mass=0.9`."""
        ssd = self.ssd
        mass = f", mass={ssd.mass}" if ssd.mass < 1 else ""
        return f"mode={ssd.mode}, experts={ssd.experts_per_token}/{ssd.num_experts}{mass}"


@eager  # each layer has its own K, and would be compiled anew for it
def _chosen(ssd: SSD, scores_TE: Tensor, mass: float) -> Tensor:
    return top_experts(scores_TE, ssd.experts_per_token, mass)
