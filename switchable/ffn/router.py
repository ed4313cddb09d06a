"""The router: which experts of an FFN a token needs.

    scores = x · Wᵀ + b             (linear, one score per expert)
    ids    = the K highest scores

Where all neurons are computed, in dense steps and for a few tokens of sparse ones, every expert's true importance is
at hand, and the router is trained on it directly. Its input is detached: no gradient that the function does not have
reaches the model.

    mass_e = Σ_{i in e} |a_i| · ‖down_i‖,      loss = cross-entropy(softmax(scores), mass / Σ mass)

Initialisation: the mean of an expert's normalised neurons (Zhang et al. 2024, public clustering code), scaled to the
mean norm of a neuron.

Shapes: T tokens, D d_model, F d_ff, E experts, I = F/E, K experts per token.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from switchable.compute.cpu.limits import has_pairs
from switchable.ranks import assign


class Router(nn.Linear):
    """A linear map from a token to one score per expert."""

    def __init__(self, d_model: int, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__(d_model, num_experts, bias=True, device=device)
        self.has_pairs = has_pairs()
        """Whether the processor multiplies bfloat16. Asked here, since a compiled forward pass cannot ask it."""

    def reset_parameters(self) -> None:
        """Start at zero without drawing random numbers: `initialise` gives the rows their values."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def initialise(self, up_FD: Tensor) -> None:
        """Set each row to the mean direction of its expert's neurons, which must stand in cluster order."""
        rows_EID = nnf.normalize(up_FD.float(), dim=1).view(self.out_features, -1, self.in_features)
        assign(self.weight, rows_EID.mean(dim=1) * up_FD.float().norm(dim=1).mean())
        self.bias.zero_()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return scores_TE, in float32.

        Products are float32 too where a loss is computed from the scores. A choice alone, without gradients, is made
        from products of bfloat16 where all else is, and the processor has an instruction for them: six times as fast,
        and what they catch of the activation mass is the same to three digits.
        """
        half = torch.is_autocast_enabled(x_TD.device.type)
        if x_TD.dtype == self.weight.dtype == torch.float32 and not half:
            return nnf.linear(x_TD, self.weight, self.bias)  # decoding feels every microsecond
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        multiplied = torch.get_autocast_dtype(x_TD.device.type) if half else x_TD.dtype
        if torch.is_grad_enabled() or not (multiplied == torch.bfloat16 and x_TD.is_cpu and self.has_pairs):
            multiplied = dtype
        with torch.autocast(x_TD.device.type, enabled=False) if half else nullcontext():
            own = (each.to(multiplied) for each in (x_TD, self.weight, self.bias))
            return nnf.linear(*own).to(dtype)


def mass_share(mass_TE: Tensor) -> Tensor:
    """Return each expert's share of a token's activation mass; zeros where no neuron of the token is active."""
    return mass_TE / mass_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass_TE.dtype).tiny)


def router_loss(scores_TE: Tensor, mass_TE: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats per token) of the router against each expert's share of the mass.

    A token none of whose neurons is active has no share to learn and counts as zero.
    """
    return -(mass_share(mass_TE) * scores_TE.log_softmax(dim=-1)).sum(dim=-1).mean()


def stride(fraction: float) -> int:
    """Return the step within the sequence that picks a fraction of the tokens, the same ones in any micro-batch."""
    return max(1, round(min(1.0 / fraction, 2**31)))  # more than any sequence is its first token alone
