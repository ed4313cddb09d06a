"""`decode`: few tokens without gradients, where reading the weights is all that costs time.

    bytes read = tokens · K · I · D · (1 + share of neurons that fire)     against  2 · F · D for the dense layer

For ReLU and squared ReLU in float32 and bfloat16 one call of compiled code does it (`compiled.py`), up to 64 tokens.

All else is done in operations of torch, token by token: each reads only the rows of its own experts, in as few calls as
possible. The experts' rows of `up` are gathered into one small buffer, which the product then finds in the cache; very
large ones are multiplied where they are. Of `down` only the rows of neurons whose activation is not zero are read:
y = Σ h_i down_i over them is what `embedding_bag` computes, without a copy. Small experts are gathered there, too: two
calls instead of six. All this wants an expert to be one block of memory (`ffn/layout.py`); other layouts work, slower.

As soon as the tokens together need most of the experts, this loses to the two large products of `masked`.

Any activation, gated or not. A graph break under `torch.compile`.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, N = K·I neurons of a
token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchable.compute.activations import RELU_TYPES, activation_named
from switchable.compute.call import Backend, ExpertCall
from switchable.compute.cpu.decode.compiled import fits, prepare_call
from switchable.compute.cpu.decode.rows import NUMBERS
from switchable.compute.cpu.limits import check_ids, why_not_in_memory
from switchable.compute.eager import eager

LARGEST_SHARE = 0.75
"""Most expert visits (T·K) per expert for which reading selected rows is faster; measured on 2 cores, D 256 to 768."""
COPIED_UP_BYTES = 2**22
"""Most bytes of `up` that are gathered for a token."""
COPIED_DOWN_BYTES = 2**20
"""Most bytes of `down` that are gathered; above, finding the neurons that fire costs less than reading the others."""


def supports(call: ExpertCall) -> str | None:
    """Return None, or why the loops and operations here cannot do a call."""
    x_TD = call.x_TD
    compiles = x_TD.dtype in NUMBERS and fits(len(x_TD), call.weights, call.num_experts, call.activation)
    if call.ragged and not compiles:
        return "takes tokens with different numbers of experts in compiled code alone, which there is none of"
    if x_TD.device.type != "cpu":
        return f"computes on the CPU, and x is on {x_TD.device}"
    if reason := why_not_in_memory(x_TD, *call.weights.tensors):
        return reason
    if call.learns:
        return "computes no gradients"
    if torch.is_autocast_enabled("cpu"):
        return "does not compute under autocast"
    if call.expert_ids_TK.numel() <= LARGEST_SHARE * call.num_experts or compiles:
        return None
    return f"reads the rows of chosen experts, and {len(x_TD)} tokens together choose most of them"


@eager
def run(call: ExpertCall) -> Tensor:
    """Return y_TD.

    Raises:
        InputError: an expert's number is not in 0..E-1, nor E in a ragged call.
    """
    x_TD, weights, ids_TK, experts = call.x_TD, call.weights, call.expert_ids_TK, call.num_experts
    prepared = None
    if x_TD.dtype in NUMBERS:  # else prepare_call has nothing to look at but the weights
        prepared = prepare_call(
            len(x_TD), weights, ids_TK, experts, ids_TK.shape[1], activation=call.activation
        )
    if prepared is None:
        return _token_by_token(call)
    check_ids(ids_TK, experts + call.ragged)
    return prepared(x_TD)


DECODE = Backend("decode", supports, run)


def _token_by_token(call: ExpertCall) -> Tensor:
    own = [_one_token(call, x_D, ids_K) for x_D, ids_K in zip(call.x_TD, call.expert_ids_TK, strict=True)]
    return torch.stack(own) if own else torch.zeros_like(call.x_TD)


def _one_token(call: ExpertCall, x_D: Tensor, ids_K: Tensor) -> Tensor:
    weights, experts, activation = call.weights, call.num_experts, call.activation
    hidden_N = _project(x_D, weights.up_FD, weights.up_bias_F, ids_K, experts)
    if weights.gate_FD is not None:
        switch_N = _project(x_D, weights.gate_FD, weights.gate_bias_F, ids_K, experts)
        hidden_N = activation_named(activation)(switch_N).mul_(hidden_N)
    else:
        hidden_N = hidden_N.relu_() if activation == "relu" else activation_named(activation)(hidden_N)
    down_FD = weights.down_FD.detach()  # a parameter would make embedding_bag prepare a backward all the same
    if (picked_ND := _gathered(down_FD, ids_K, experts, COPIED_DOWN_BYTES)) is not None:
        return torch.mv(picked_ND.t(), hidden_N)
    neurons = len(hidden_N) // len(ids_K)
    rows = torch.add(ids_K.unsqueeze(1) * neurons, torch.arange(neurons, device="cpu")).view(-1)
    starts = torch.arange(0, len(rows), neurons, device="cpu")  # a sum per expert: shared out over threads
    if activation in RELU_TYPES:
        firing = hidden_N.nonzero().squeeze(1)
        rows, hidden_N, starts = rows[firing], hidden_N[firing], torch.searchsorted(firing, starts)
    sums_KD: Tensor = torch.embedding_bag(down_FD, rows, starts, mode=0, per_sample_weights=hidden_N)[0]
    return sums_KD.sum(0)


def _project(
    x_D: Tensor, matrix_FD: Tensor, bias_F: Tensor | None, ids_K: Tensor, num_experts: int
) -> Tensor:
    """Return x · matrixᵀ + bias for the neurons of the experts chosen."""
    if (picked_ND := _gathered(matrix_FD, ids_K, num_experts, COPIED_UP_BYTES)) is not None:
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
