"""The router: which experts of an FFN a token needs.

    scores = x · Wᵀ + b             (linear, one score per expert)
    ids    = the K highest scores
    gate   = 1, so that "all experts selected" *is* the dense layer

Where all neurons are computed, in dense steps and for a few tokens of sparse ones, every expert's true importance is
at hand, and the router is trained on it directly. Its input is detached: no gradient that the function does not have
reaches the model.

    mass_e = Σ_{i in e} |a_i| · ‖down_i‖,      loss = cross-entropy(softmax(scores), mass / Σ mass)

(Or, in place of the mass, the norm of what the expert writes, or 1 for the K experts of most mass.)

With `router_gate_gradient` the gate is 1 + p - stop_gradient(p), p the softmax over the selected scores: still exactly
1, and in sparse steps the router also learns from the loss through p (straight-through). Measured, that unlearns the
mass between two dense steps.

Initialisation: the mean of an expert's normalised neurons (Zhang et al. 2024, public clustering code), scaled to the
mean norm of a neuron.

Shapes: T tokens, D d_model, F d_ff, E experts, I = F/E, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from switchable.compute.cpu.topk import top_experts
from switchable.ranks import assign


class Router(nn.Linear):
    """A linear map from a token to one score per expert."""

    def __init__(self, d_model: int, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__(d_model, num_experts, bias=True, device=device)

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
        """Return scores_TE, in float32 whatever the autocast: a choice must not hang on a rounding of 8 bits."""
        if x_TD.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled(
            x_TD.device.type
        ):
            return nnf.linear(
                x_TD, self.weight, self.bias
            )  # the usual case, and decoding feels every microsecond
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return nnf.linear(x_TD.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def select(scores_TE: Tensor, experts_per_token: int, noise: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Return the K best experts of each token and their gates.

    Args:
        scores_TE: the router's.
        experts_per_token: K.
        noise: scale of Gumbel noise on the scores that are ranked. With 1, experts are drawn without replacement with
            the probabilities softmax(scores), which are the shares of the mass as the router sees them
            (Gumbel-top-k, Kool et al. 2019); less noise prefers the best ones more.

    Returns:
        ids_TK, int64, and gates_TK, whose values are exactly 1 and whose gradient reaches the scores; None in place
        of gates through which no gradient would flow.
    """
    ranked_TE = scores_TE
    if noise:
        ranked_TE = scores_TE.detach() - noise * torch.empty_like(scores_TE).exponential_().log_()
    ids_TK = top_experts(ranked_TE, experts_per_token)
    if not scores_TE.requires_grad:
        return ids_TK, None
    p_TK = scores_TE.gather(-1, ids_TK).softmax(dim=-1)
    return ids_TK, 1.0 + (p_TK - p_TK.detach())


def softmax_gates(scores_TE: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Return the K best experts of each token and the gates of a mixture of experts, K x softmax over their scores.

    The factor K makes the gates 1 on average, so that the layer starts at the scale of the dense one.

    Returns:
        ids_TK, int64, and gates_TK, which add up to K for each token.
    """
    ids_TK = top_experts(scores_TE, experts_per_token)
    return ids_TK, experts_per_token * scores_TE.gather(-1, ids_TK).softmax(dim=-1)


def load_balance_loss(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Return E Σ_e f_e P_e: 1 if all experts are used alike, E if one does everything (Fedus et al. 2022).

    f_e is expert e's share of the choices, P_e the mean over the tokens of its softmax probability, through which
    the gradient flows.
    """
    experts = scores_TE.shape[-1]
    share_E = torch.bincount(ids_TK.reshape(-1), minlength=experts) / ids_TK.numel()
    return experts * (share_E * scores_TE.softmax(dim=-1).mean(dim=0)).sum()


def expert_mass(hidden_TF: Tensor, down_FD: Tensor, num_experts: int) -> Tensor:
    """Return mass_TE, the activation mass of each expert: Σ over its neurons of |a_i| · ‖down_i‖."""
    norms_EI = down_FD.float().norm(dim=1).view(num_experts, -1)
    hidden_TEI = hidden_TF.float().abs().view(hidden_TF.shape[0], num_experts, -1)
    return torch.einsum("tei,ei->te", hidden_TEI, norms_EI)


def expert_norm(hidden_TF: Tensor, down_FD: Tensor, num_experts: int) -> Tensor:
    """Return norm_TE, the length of what each expert writes: ‖Σ over its neurons of a_i · down_i‖."""
    down_EID = down_FD.float().view(num_experts, -1, down_FD.shape[1])
    gram_EII = down_EID @ down_EID.mT
    hidden_ETI = hidden_TF.float().view(hidden_TF.shape[0], num_experts, -1).transpose(0, 1)
    squares_ET = ((hidden_ETI @ gram_EII) * hidden_ETI).sum(dim=-1)
    return squares_ET.clamp_min(0.0).sqrt().T


def ranked_first(mass_TE: Tensor, experts_per_token: int) -> Tensor:
    """Return 1 for the K experts with the most mass of each token, 0 for the others and for those without any."""
    top_TK = mass_TE.topk(experts_per_token, dim=-1).indices
    return torch.zeros_like(mass_TE).scatter_(-1, top_TK, 1.0) * (mass_TE > 0)


def importance(
    hidden_TF: Tensor, down_FD: Tensor, num_experts: int, experts_per_token: int, objective: str
) -> Tensor:
    """Return importance_TE, whose shares the router learns, after `router_objective`: `mass`, `norm` or `ranking`."""
    if objective == "norm":
        return expert_norm(hidden_TF, down_FD, num_experts)
    mass_TE = expert_mass(hidden_TF, down_FD, num_experts)
    return ranked_first(mass_TE, experts_per_token) if objective == "ranking" else mass_TE


def router_loss(scores_TE: Tensor, mass_TE: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats per token) of the router against each expert's share of the importance.

    A token none of whose neurons is active has no share to learn and counts as zero.
    """
    share_TE = mass_TE / mass_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass_TE.dtype).tiny)
    return -(share_TE * scores_TE.log_softmax(dim=-1)).sum(dim=-1).mean()


def share_missed(mass_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Return the share of the mass outside the chosen experts, mean over the tokens, 0 to 1.

    As a penalty on the activations it is to neurons what the router's loss is to the router: each learns to suit the
    other, as codes and encoder do through the commitment loss of van den Oord et al. 2017 (VQ-VAE, section 3.2). A
    token none of whose neurons is active misses nothing.
    """
    caught_T = mass_TE.gather(-1, ids_TK).sum(dim=-1)
    total_T = mass_TE.sum(dim=-1)
    return ((total_T - caught_T) / total_T.clamp_min(torch.finfo(mass_TE.dtype).tiny)).mean()


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """Pass `y` through unchanged and add `loss` to whatever is minimised downstream.

    So a router learns in any training loop, without the loop having to collect its loss.
    """
    attached: Tensor = _AttachLoss.apply(y, loss)  # type: ignore[no-untyped-call]
    return attached


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return grads[0], one
