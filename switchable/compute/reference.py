"""The reference: a loop over experts in plain autograd, as short as it can be. Every fast path must agree with it.

    y_t = Σ_k FFN_e(t,k)(x_t)

Any device, dtype and activation, gated or not.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from switchable.compute.call import Backend, ExpertCall


def reference(call: ExpertCall, hidden_dropout: float = 0.0) -> Tensor:
    """Return y_TD, computing only the selected experts of each token.

    `hidden_dropout` is the probability of a dropout between the projections, for models trained with one.
    """
    x_TD = call.x_TD
    y_TD = torch.zeros_like(x_TD)
    for e in range(call.num_experts):
        own = call.weights.part(slice(e * call.neurons, (e + 1) * call.neurons))
        tokens, _ = torch.where(call.expert_ids_TK == e)
        hidden = own.activations(x_TD[tokens], call.activation)
        if hidden_dropout:
            hidden = dropout(hidden, hidden_dropout)
        y = hidden @ own.down_FD
        y_TD = y_TD.index_add(0, tokens, y.to(y_TD.dtype))
    return y_TD


REFERENCE = Backend("reference", lambda _call: None, reference)
