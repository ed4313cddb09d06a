"""`decode`: 1 to 16 tokens without gradients, where reading the weights is all that costs time.

    bytes read = tokens · K · (2 · I · D)  against  E · (2 · I · D) for the dense layer

While that is clearly less than the whole layer, every token multiplies views of its own experts' rows, one
matrix-vector product per projection: nothing is copied, and the only list that Python walks through is the K
selected experts. As soon as the tokens together need most of the experts, a loop loses to the two large products of
the dense layer; then all neurons are computed and the activations of the experts not selected are set to zero,
which is the same function at the price of the dense layer.

Any activation, with or without bias, gated or not. Calls that need gradients, and autocast, go to `sorted`. The
loop is a graph break under `torch.compile`; the masked form compiles.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from switchable.ffn.experts.cpu import sorted_experts
from switchable.ffn.experts.weights import FFNWeights

LARGEST_SHARE = 0.75
"""Most expert visits (T·K) per expert for which one token at a time is faster; measured on 2 cores, D 256 to 768."""


def decode(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    *,
    num_experts: int,
    activation: str,
    unit_gates: bool = False,
) -> Tensor:
    """Return y_TD (see `expert_ffn` for the arguments)."""
    tensors = (x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F, weights.gate_FD, gates_TK)
    learns = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    if learns or torch.is_autocast_enabled(x_TD.device.type):
        return sorted_experts(
            x_TD,
            weights,
            expert_ids_TK,
            gates_TK,
            num_experts=num_experts,
            activation=activation,
            unit_gates=unit_gates,
        )
    gates = None if unit_gates else gates_TK
    if expert_ids_TK.numel() <= LARGEST_SHARE * num_experts:
        y_TD: Tensor = _token_by_token(x_TD, weights, expert_ids_TK, gates, num_experts, activation)
        return y_TD
    return _all_masked(x_TD, weights, expert_ids_TK, gates, num_experts, activation)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _token_by_token(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    num_experts: int,
    activation: str,
) -> Tensor:
    neurons = weights.up_FD.shape[0] // num_experts
    y_TD = torch.zeros_like(x_TD, memory_format=torch.contiguous_format)
    hidden_TKI = x_TD.new_empty(*expert_ids_TK.shape, neurons)
    for t, experts in enumerate(expert_ids_TK.tolist()):
        own = [slice(e * neurons, (e + 1) * neurons) for e in experts]
        x_D, hidden_KI, y_D = x_TD[t], hidden_TKI[t], y_TD[t]
        _project(x_D, weights.up_FD, weights.up_bias_F, own, hidden_KI)
        if weights.gate_FD is not None:
            switch_KI = torch.empty_like(hidden_KI)
            _project(x_D, weights.gate_FD, weights.gate_bias_F, own, switch_KI)
            hidden_KI = hidden_KI.mul_(ACT2FN[activation](switch_KI))
        else:
            hidden_KI = hidden_KI.relu_() if activation == "relu" else ACT2FN[activation](hidden_KI)
        if gates_TK is not None:
            hidden_KI = hidden_KI * gates_TK[t].unsqueeze(1)
        for rows, hidden_I in zip(own, hidden_KI.unbind(0), strict=True):
            y_D.addmv_(weights.down_FD[rows].t(), hidden_I)
    return y_TD


def _project(x_D: Tensor, matrix_FD: Tensor, bias_F: Tensor | None, own: list[slice], out_KI: Tensor) -> None:
    for rows, out_I in zip(own, out_KI.unbind(0), strict=True):
        if bias_F is None:
            torch.mv(matrix_FD[rows], x_D, out=out_I)
        else:
            torch.addmv(bias_F[rows], matrix_FD[rows], x_D, out=out_I)


def _all_masked(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    num_experts: int,
    activation: str,
) -> Tensor:
    hidden_TF = linear(x_TD, weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        hidden_TF = hidden_TF.relu_() if activation == "relu" else ACT2FN[activation](hidden_TF)
    else:
        hidden_TF = ACT2FN[activation](linear(x_TD, weights.gate_FD, weights.gate_bias_F)).mul_(hidden_TF)
    factors_TK = hidden_TF.new_ones(expert_ids_TK.shape) if gates_TK is None else gates_TK.to(hidden_TF.dtype)
    factors_TE = hidden_TF.new_zeros(len(x_TD), num_experts).scatter_(1, expert_ids_TK, factors_TK)
    hidden_TEI = hidden_TF.view(len(x_TD), num_experts, weights.up_FD.shape[0] // num_experts)
    return hidden_TEI.mul_(factors_TE.unsqueeze(2)).view_as(hidden_TF) @ weights.down_FD
