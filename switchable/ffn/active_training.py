"""Training in dense mode at the cost of the active neurons: `compute/cpu/active` for a switchable FFN.

The layer's function and gradient stay the dense ones. The router learns from what the loops have at hand, each expert's
activation mass.

Shapes: B batch, S sequence, T = B·S tokens, D d_model, F d_ff, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchable.compute.cpu.active.active import active, has_active
from switchable.ffn.attached import teach
from switchable.ffn.router import Router, stride
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


def forward(ssd: SSD, router: Router, x_BSD: Tensor) -> Tensor:
    """Map [..., D] to [..., D] as dense mode does, up to rounding; `applies` must hold."""
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
    y_TD, bias = found.y_TD, ssd.down_projection.bias
    if found.mass_TE is not None:
        every = stride(ssd.settings.config.router_token_fraction)
        mass_TE = found.mass_TE.view(*x_BSD.shape[:-1], -1)[..., ::every, :].flatten(0, -2)
        scores_TE = router(x_BSD[..., ::every, :].detach().flatten(0, -2))
        taught_TD = teach(y_TD, scores_TE, mass_TE, factor)
        # What a loss hangs on must not be added to in place.
        y_TD = taught_TD.clone() if bias is None else taught_TD
    y_BSD: Tensor = (y_TD if bias is None else y_TD + bias.to(y_TD.dtype)).view(x_BSD.shape)
    return y_BSD
