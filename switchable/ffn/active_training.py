"""Training in dense mode at the cost of the active neurons: `compute/cpu/active/active.py` for a switchable FFN.

The layer's function and gradient stay the dense ones. The router learns from what the loop has at hand, each expert's
mass.

Shapes: B batch, S sequence, T = B·S tokens, D d_model, F d_ff, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from switchable.compute.cpu.active.active import active, has_active
from switchable.ffn.router import ranked_first, router_loss

if TYPE_CHECKING:
    from switchable.ffn.layer import SwitchableFFN

LEAST_TOKENS = 512
"""With fewer, dense products are as fast."""


@dataclass
class Seen:
    """What the active neurons came to: over all tokens and steps, until taken."""

    entries: int = 0
    tokens: int = 0

    def take(self, d_ff: int) -> float | None:
        """Return the share of the activations that were not zero, and start anew; None if no token was seen."""
        share = self.entries / (self.tokens * d_ff) if self.tokens else None
        self.entries = self.tokens = 0
        return share


def applies(layer: SwitchableFFN, x_BSD: Tensor) -> bool:
    """Whether this forward pass is one of training for which there are loops."""
    return (
        layer.training
        and torch.is_grad_enabled()
        and x_BSD.shape[:-1].numel() >= LEAST_TOKENS
        and not (layer.hidden_dropout or layer.commitment)
        and not (layer.router_learns and layer.router_objective == "norm")
        and has_active(x_BSD, layer.weights, layer.act_name)
    )


def forward(layer: SwitchableFFN, x_BSD: Tensor) -> Tensor:
    """Map [..., D] to [..., D] as dense mode does, up to rounding; `applies` must hold."""
    x_TD = x_BSD.reshape(-1, layer.d_model)
    found = active(
        x_TD,
        layer.weights,
        layer.act_name,
        num_experts=layer.num_experts if layer.router_learns else None,
        penalty=layer.activation_l1 * layer.attached_loss_weight / len(x_TD),
    )
    layer.active_seen.entries += found.entries
    layer.active_seen.tokens += len(x_TD)
    y_TD, bias = found.y_TD, layer.down_projection.bias
    y_BSD: Tensor = (y_TD if bias is None else y_TD + bias).view(x_BSD.shape)
    if found.mass_TE is None:
        return y_BSD
    every = stride(layer.router_token_fraction)
    mass_TE = found.mass_TE.view(*x_BSD.shape[:-1], -1)[..., ::every, :].flatten(0, -2)
    if layer.router_objective == "ranking":
        mass_TE = ranked_first(mass_TE, layer.experts_per_token)
    seen = x_BSD[..., ::every, :].detach().flatten(0, -2)
    taught: Tensor = layer.attach(y_BSD, router_loss(layer.router(seen), mass_TE))
    return taught


def stride(fraction: float) -> int:
    """Return the step within the sequence that picks a fraction of the tokens, the same ones in any micro-batch."""
    return max(1, round(1.0 / fraction))
