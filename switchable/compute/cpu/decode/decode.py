"""`decode`: few tokens without gradients, where reading the weights is all that costs time.

    bytes read = tokens · K · I · D · (1 + share of neurons that fire)     against  2 · F · D for the dense layer

For ReLU and squared ReLU in float32 one call of compiled code does it (`few.py`), up to 63 tokens. All else, 1 to 16
tokens, is done in operations of torch.

While that is clearly less than the whole layer, each token reads only the rows of its own experts, in as few calls as
possible. The experts' rows of `up` are gathered into one small buffer, which the product then finds in the cache;
very large ones are multiplied where they are. Of `down` only the rows of neurons whose activation is not zero are
read: y = Σ h_i down_i over them is what `embedding_bag` computes, without a copy. Small experts are gathered there,
too: two calls instead of six. All this wants an expert to be one block of memory (`ffn/layout.py`); other layouts
work, slower.

As soon as the tokens together need most of the experts, this loses to the two large products of the dense layer: then
`masked` takes over.

Any activation, with or without bias, gated or not. Calls that need gradients, and autocast, go to `sorted`. The first
form is a graph break under `torch.compile`; the masked form compiles.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, N = K·I neurons of a
token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from switchable.compute.call import ExpertCall
from switchable.compute.cpu.decode.compiled import few_tokens
from switchable.compute.cpu.pairs import check_ids
from switchable.compute.cpu.sorted import sorted_experts
from switchable.compute.masked import masked
from switchable.compute.weights import FFNWeights

LARGEST_SHARE = 0.75
"""Most expert visits (T·K) per expert for which reading selected rows is faster; measured on 2 cores, D 256 to 768."""
COPIED_UP_BYTES = 2**22
"""Most bytes of `up` that are gathered for a token."""
COPIED_DOWN_BYTES = 2**20
"""Most bytes of `down` that are gathered; above, finding the neurons that fire costs less than reading the others."""
ZERO_MOSTLY = ("relu", "relu2")
"""Activations that are exactly zero for many neurons."""


def decode(call: ExpertCall) -> Tensor:
    """Return y_TD."""
    x_TD, weights, ids_TK = call.x_TD, call.weights, call.expert_ids_TK
    num_experts, activation = call.num_experts, call.activation
    if call.learns or torch.is_autocast_enabled(x_TD.device.type):
        return sorted_experts(call)
    gates = call.gates_that_count
    if weights.gate_FD is None and gates is None and x_TD.device.type == "cpu":
        check_ids(ids_TK, num_experts)
        found: Tensor | None = few_tokens(
            x_TD.contiguous(),
            weights,
            ids_TK,
            num_experts,
            ids_TK.shape[1],
            activation=activation,
        )
        if found is not None:
            return found
    if ids_TK.numel() <= LARGEST_SHARE * num_experts:
        y_TD: Tensor = _token_by_token(x_TD, weights, ids_TK, gates, num_experts, activation)
        return y_TD
    return masked(call)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _token_by_token(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    num_experts: int,
    activation: str,
) -> Tensor:
    own = [
        _one_token(x_D, weights, ids_K, num_experts, activation, None if gates_TK is None else gates_TK[t])
        for t, (x_D, ids_K) in enumerate(zip(x_TD, expert_ids_TK, strict=True))
    ]
    return own[0].unsqueeze(0) if len(own) == 1 else torch.stack(own) if own else torch.zeros_like(x_TD)


def _one_token(
    x_D: Tensor,
    weights: FFNWeights,
    ids_K: Tensor,
    num_experts: int,
    activation: str,
    gates_K: Tensor | None,
) -> Tensor:
    hidden_N = _project(x_D, weights.up_FD, weights.up_bias_F, ids_K, num_experts)
    if weights.gate_FD is not None:
        switch_N = _project(x_D, weights.gate_FD, weights.gate_bias_F, ids_K, num_experts)
        hidden_N = ACT2FN[activation](switch_N).mul_(hidden_N)
    else:
        hidden_N = hidden_N.relu_() if activation == "relu" else ACT2FN[activation](hidden_N)
    if gates_K is not None:
        factors_K1 = gates_K.to(hidden_N.dtype).unsqueeze(1)
        hidden_N = (hidden_N.view(len(ids_K), -1) * factors_K1).view(-1)
    down_FD = weights.down_FD.detach()  # a parameter would make embedding_bag prepare a backward all the same
    picked_ND = _gathered(down_FD, ids_K, num_experts, COPIED_DOWN_BYTES)
    if picked_ND is not None:
        return torch.mv(picked_ND.t(), hidden_N)
    neurons = len(hidden_N) // len(ids_K)
    rows = torch.add(ids_K.unsqueeze(1) * neurons, torch.arange(neurons)).view(-1)
    starts = torch.arange(0, len(rows), neurons)  # one sum per expert: they are shared out over threads
    if activation in ZERO_MOSTLY:
        firing = hidden_N.nonzero().squeeze(1)
        rows, hidden_N, starts = rows[firing], hidden_N[firing], torch.searchsorted(firing, starts)
    sums_KD: Tensor = torch.embedding_bag(down_FD, rows, starts, mode=0, per_sample_weights=hidden_N)[0]
    return sums_KD.sum(0)


def _project(
    x_D: Tensor, matrix_FD: Tensor, bias_F: Tensor | None, ids_K: Tensor, num_experts: int
) -> Tensor:
    """Return x · matrixᵀ + bias for the neurons of the experts chosen."""
    picked_ND = _gathered(matrix_FD, ids_K, num_experts, COPIED_UP_BYTES)
    if picked_ND is not None:
        if bias_F is None:
            return torch.mv(picked_ND, x_D)
        return torch.addmv(bias_F.view(num_experts, -1).index_select(0, ids_K).view(-1), picked_ND, x_D)
    neurons = matrix_FD.shape[0] // num_experts
    hidden_KI = x_D.new_empty(len(ids_K), neurons)
    for expert, out_I in zip(ids_K.tolist(), hidden_KI.unbind(0), strict=True):
        own = slice(expert * neurons, (expert + 1) * neurons)
        if bias_F is None:
            torch.mv(matrix_FD[own], x_D, out=out_I)
        else:
            torch.addmv(bias_F[own], matrix_FD[own], x_D, out=out_I)
    return hidden_KI.view(-1)


def _gathered(matrix_FD: Tensor, ids_K: Tensor, num_experts: int, most_bytes: int) -> Tensor | None:
    """Return a copy of the chosen experts' rows, or None where they are too large or not in one piece."""
    neurons, width = matrix_FD.shape[0] // num_experts, matrix_FD.shape[1]
    if len(ids_K) * neurons * width * matrix_FD.itemsize > most_bytes or not matrix_FD.is_contiguous():
        return None
    return matrix_FD.view(num_experts, -1).index_select(0, ids_K).view(-1, width)
