"""`masked`: all neurons computed, the activations of experts not chosen set to zero.

    y_t = down · (m_t ⊙ act(up · x_t)),     m_ti = 1 if the expert of neuron i was chosen, else 0

The function of the selected experts at about the price of the dense layer. It is the fastest way where the tokens are
so few, or their choices so wide, that two large products beat many small ones. Plain autograd, any device,
activation and dtype; compiles whole.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from switchable.compute.call import Backend, ExpertCall


def masked(call: ExpertCall) -> Tensor:
    """Return y_TD."""
    x_TD, weights, ids_TK = call.x_TD, call.weights, call.expert_ids_TK
    hidden_TF = weights.activations(x_TD, call.activation)
    chosen_TK = hidden_TF.new_ones(ids_TK.shape)
    mask_TE = hidden_TF.new_zeros(len(x_TD), call.num_experts + call.ragged).scatter(1, ids_TK, chosen_TK)
    mask_TE1 = mask_TE[:, : call.num_experts].unsqueeze(2)
    hidden_TEI = hidden_TF.view(len(x_TD), call.num_experts, call.neurons)
    learns = torch.is_grad_enabled() and hidden_TEI.requires_grad
    hidden_TEI = hidden_TEI * mask_TE1 if learns else hidden_TEI.mul_(mask_TE1)
    return linear(hidden_TEI.view_as(hidden_TF), weights.down_FD.t()).to(x_TD.dtype)


MASKED = Backend("masked", lambda _call: None, masked)
