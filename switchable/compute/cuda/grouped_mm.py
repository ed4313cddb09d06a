"""The sparse FFN by torch's grouped product, one library call per projection: the default on CUDA.

    x_RD = x_TD[order // K];    h_RI = act(x_RD · up_eᵀ + bias_e);    z_RD = h_RI · down_e;    y_t = Σ_k z_tk

`torch.nn.functional.grouped_mm` multiplies the rows of every expert by that expert's matrix. Where an expert's rows
end is read from a tensor, so the host waits for nothing. The K copies of every token, which the Triton backend
gathers while it multiplies, are written to memory here; in return the kernels are the vendor's.
`benchmarks/ffn_cuda.py` compares the two.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, R = T·K rows in expert order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from switchable.compute.activations import activation_named
from switchable.compute.call import Backend, ExpertCall, compute_dtype, why_not_dtype
from switchable.compute.cuda.sort import sort_by_expert


def _supports(call: ExpertCall) -> str | None:
    # On CUDA torch has a kernel for bfloat16 alone, else it waits and loops; traced, it takes no other type anywhere.
    narrow = call.x_TD.is_cuda or torch.compiler.is_compiling()
    dtypes = (torch.bfloat16,) if narrow else (torch.bfloat16, torch.float16, torch.float32)
    if (reason := why_not_dtype(call, dtypes)) is not None:
        return reason
    multiple = 16 // compute_dtype(call).itemsize  # torch wants rows of whole 16 bytes
    d_model, neurons = call.x_TD.shape[1], call.neurons
    if d_model % multiple or neurons % multiple:
        return f"needs multiples of {multiple}, and d_model is {d_model}, neurons per expert {neurons}"
    if call.ragged and call.learns:
        return "computes no gradients where tokens have different numbers of experts"
    return None if call.expert_ids_TK.numel() else "needs at least one token"


class _Take(torch.autograd.Function):
    """rows_R = x[index // K], whose gradient is a sum over K in a fixed order, not an atomic scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor, inverse_R: Tensor, per_row: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.per_row = per_row
        return x[index_R // per_row]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        pairs = grads[0][inverse_R]
        return pairs.view(-1, ctx.per_row, pairs.shape[1]).sum(1), None, None, None


def _take(x: Tensor, index_R: Tensor, inverse_R: Tensor, per_row: int) -> Tensor:
    rows: Tensor = _Take.apply(x, index_R, inverse_R, per_row)  # type: ignore[no-untyped-call]
    return rows


def _run(call: ExpertCall) -> Tensor:
    x_TD, weights, ids_TK = call.x_TD, call.weights, call.expert_ids_TK
    E, K, neurons, dtype = call.num_experts, ids_TK.shape[1], call.neurons, compute_dtype(call)
    order_R, position_R, ends_E = sort_by_expert(ids_TK, E)
    # A product with 0s and 1s gives each row its bias: the gradient of indexing would add row by row.
    experts_E = torch.arange(E, device=ids_TK.device)
    expert_R = ids_TK.reshape(-1)[order_R]
    member_RE = (expert_R.unsqueeze(1) == experts_E).to(dtype)

    def project(rows: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        out = grouped_mm(rows, weight_FD.to(dtype).view(E, neurons, -1).transpose(1, 2), offs=ends_E)
        return out if bias_F is None else torch.addmm(out, member_RE, bias_F.to(dtype).view(E, neurons))

    x_RD = _take(x_TD.to(dtype), order_R, position_R, K)
    hidden_RI = project(x_RD, weights.up_FD, weights.up_bias_F)
    act = activation_named(call.activation)
    if weights.gate_FD is None:
        hidden_RI = act(hidden_RI)
    else:
        hidden_RI = act(project(x_RD, weights.gate_FD, weights.gate_bias_F)) * hidden_RI
    z_RD = grouped_mm(hidden_RI, weights.down_FD.to(dtype).view(E, neurons, -1), offs=ends_E)
    if call.ragged:  # rows of no expert come last: nothing has been written there
        z_RD = z_RD.masked_fill((expert_R == E).unsqueeze(1), 0)
    return _take(z_RD, position_R, order_R, 1).view(-1, K, z_RD.shape[1]).sum(1).to(x_TD.dtype)


GROUPED_MM = Backend("grouped_mm", _supports, _run)
"""Any activation, gated or not; on CUDA in bfloat16."""
