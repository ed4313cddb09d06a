"""Training in dense mode at the cost of the active neurons: `compute/cpu/active` for a switchable FFN.

The layer's function and gradient stay the dense ones. The loops have each expert's activation mass at hand, from which
the router learns.

Shapes: B batch, S sequence, T = B·S tokens, D d_model, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchable.compute.cpu.active.active import active, has_active
from switchable.ffn.ssd import SSD

LEAST_TOKENS = 512
"""With fewer, dense products are as fast."""


def applies(ssd: SSD, x_BSD: Tensor) -> bool:
    """Whether this forward pass, which is one of training, leaves out idle neurons."""
    return ssd.multiplies_active and skips(ssd, x_BSD, ssd.activation_ratio)


def skips(ssd: SSD, x_BSD: Tensor, share: float) -> bool:
    """Whether a layer can leave out idle neurons of such an input, and should with such a share of active ones."""
    return (
        x_BSD.shape[:-1].numel() >= LEAST_TOKENS
        and not ssd.hidden_dropout
        and has_active(x_BSD, ssd.weights, ssd.settings.activation, share)
    )


def input_like(ssd: SSD, tokens: int) -> Tensor:
    """Return an input of so many tokens that takes no memory."""
    weight = ssd.up_projection.weight
    return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(tokens, ssd.d_model)


def forward(ssd: SSD, x_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return y_TD as dense mode does, up to rounding and without the last bias; and mass_TE if the router learns.

    `applies` must hold.
    """
    x_TD = x_BSD.reshape(-1, ssd.d_model)
    factor, penalty = ssd.loss_scale.now, ssd.activation_l1 / len(x_TD)
    found = active(
        x_TD,
        ssd.weights,
        ssd.settings.activation,
        num_experts=ssd.num_experts if ssd.router_learns else None,
        penalty=(lambda: float(factor) * penalty) if penalty else None,
    )
    ssd.active_count.entries += found.entries
    ssd.active_count.tokens += len(x_TD)
    return found.y_TD, found.mass_TE
