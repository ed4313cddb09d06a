"""The reference: a loop over experts in plain autograd, as short as it can be. Every fast path must agree with it.

    y_t = Σ_k gate_tk · FFN_{e(t,k)}(x_t)

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from switchable.compute.call import ExpertCall


def eager(call: ExpertCall, hidden_dropout: float = 0.0) -> Tensor:
    """Return y_TD, computing only the selected experts of each token, and multiplying by gates even when they are one.

    `hidden_dropout` is the probability of a dropout between the projections, for models trained with one.
    """
    x_TD, weights, gates_TK = call.x_TD, call.weights, call.gates_TK
    act = ACT2FN[call.activation]
    y_TD = torch.zeros_like(x_TD)
    for e in range(call.num_experts):
        own = slice(e * call.neurons, (e + 1) * call.neurons)
        tokens, slots = torch.where(call.expert_ids_TK == e)
        x = x_TD[tokens]
        hidden = torch.nn.functional.linear(x, weights.up_FD[own], _part(weights.up_bias_F, own))
        if weights.gate_FD is None:
            hidden = act(hidden)
        else:
            hidden = (
                act(torch.nn.functional.linear(x, weights.gate_FD[own], _part(weights.gate_bias_F, own)))
                * hidden
            )
        if hidden_dropout:
            hidden = torch.nn.functional.dropout(hidden, hidden_dropout)
        y = hidden @ weights.down_FD[own]
        if gates_TK is not None:
            y = y * gates_TK[tokens, slots].unsqueeze(-1)
        y_TD = y_TD.index_add(0, tokens, y.to(y_TD.dtype))
    return y_TD


def _part(bias_F: Tensor | None, own: slice) -> Tensor | None:
    return None if bias_F is None else bias_F[own]


reference = eager
