"""The two plain ways, in torch's own autograd: any device, dtype and activation, gated or not.

`reference` is a loop over experts, as short as it can be: every fast path must agree with it.

    y_t = Σ_k FFN_e(t,k)(x_t)

`masked` computes all neurons, and sets the activations of experts not chosen to zero. That is the function of the
selected experts at about the price of the dense layer: the fastest way where the tokens are so few, or their choices so
wide, that two large products beat many small ones. It compiles whole.

    y_t = down · (m_t ⊙ act(up · x_t)),     m_ti = 1 if the expert of neuron i was chosen, else 0

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from switchable.compute.call import Backend, ExpertCall


def reference(call: ExpertCall, hidden_dropout: float = 0.0) -> Tensor:
    """Return y_TD, computing each token's experts alone; `hidden_dropout` is a probability, between the projections."""
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


def masked(call: ExpertCall) -> Tensor:
    """Return y_TD, computing all neurons."""
    x_TD, weights, ids_TK = call.x_TD, call.weights, call.expert_ids_TK
    hidden_TF = weights.activations(x_TD, call.activation)
    chosen_TK = hidden_TF.new_ones(ids_TK.shape)
    mask_TE = hidden_TF.new_zeros(len(x_TD), call.num_experts + call.ragged).scatter(1, ids_TK, chosen_TK)
    mask_TE1 = mask_TE[:, : call.num_experts].unsqueeze(2)
    hidden_TEI = hidden_TF.view(len(x_TD), call.num_experts, call.neurons)
    learns = torch.is_grad_enabled() and hidden_TEI.requires_grad
    hidden_TEI = hidden_TEI * mask_TE1 if learns else hidden_TEI.mul_(mask_TE1)
    return linear(hidden_TEI.view_as(hidden_TF), weights.down_FD.t()).to(x_TD.dtype)


REFERENCE = Backend("reference", lambda _call: None, reference)
MASKED = Backend("masked", lambda _call: None, masked)
