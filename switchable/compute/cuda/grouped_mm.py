"""The sparse FFN by torch's grouped product: one library call per projection, with the K-fold copies.

    x_RD = x_TD[order // K];  h_RI = act(x_RD · up_eᵀ + bias_e);  z_RD = h_RI · down_e;  y_t = Σ_k γ_tk z_tk

where `torch.nn.functional.grouped_mm` multiplies the rows of every expert by that expert's matrix, its
borders taken from a tensor: no host sync. It reads and writes R = T·K rows of length D where the Triton
path gathers, but its kernels are the vendor's: `benchmarks/ffn_cuda.py` says which is faster where.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, R = T·K rows in expert
order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from transformers.activations import ACT2FN

from switchable.compute.call import ExpertCall
from switchable.compute.reference import eager


class _Take(torch.autograd.Function):
    """rows_R = x[index // K], whose gradient is a sum over K in a fixed order, not an atomic scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor, inverse_R: Tensor, per_row: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.per_row = per_row
        return x[index_R // per_row]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        pairs = grads[0][inverse_R]
        return (
            (pairs if ctx.per_row == 1 else pairs.view(-1, ctx.per_row, pairs.shape[1]).sum(1)),
            None,
            None,
            None,
        )


def torch_grouped_mm(call: ExpertCall) -> Tensor:
    """Return y_TD.

    `grouped_mm` wants rows of multiples of 16 bytes, and on CUDA has a kernel for bfloat16 alone (for the
    other dtypes it waits for the borders and loops): all else goes to `eager`.
    """
    x_TD, weights, ids_TK, gates_TK = call.x_TD, call.weights, call.expert_ids_TK, call.gates_TK
    E, K, neurons = call.num_experts, ids_TK.shape[1], call.neurons
    dtype = _dtype(x_TD)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in (x_TD.shape[1], neurons))
    dtypes = (torch.bfloat16,) if x_TD.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if not aligned or dtype not in dtypes or not ids_TK.numel():
        return eager(call)
    sorted_R, order_R = ids_TK.reshape(-1).sort(stable=True)
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    experts_E = torch.arange(E, device=sorted_R.device)
    ends_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    # A product with 0s and 1s gives each row its bias: the gradient of indexing would add row by row.
    member_RE = (sorted_R.unsqueeze(1) == experts_E).to(dtype)

    def project(rows: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        out = grouped_mm(rows, weight_FD.to(dtype).view(E, neurons, -1).transpose(1, 2), offs=ends_E)
        return out if bias_F is None else torch.addmm(out, member_RE, bias_F.to(dtype).view(E, neurons))

    x_RD = _take(x_TD.to(dtype), order_R, position_R, K)
    hidden_RI = project(x_RD, weights.up_FD, weights.up_bias_F)
    act = ACT2FN[call.activation]
    if weights.gate_FD is None:
        hidden_RI = act(hidden_RI)
    else:
        hidden_RI = act(project(x_RD, weights.gate_FD, weights.gate_bias_F)) * hidden_RI
    z_RD = grouped_mm(hidden_RI, weights.down_FD.to(dtype).view(E, neurons, -1), offs=ends_E)
    z_TKD = _take(z_RD, position_R, order_R, 1).view(-1, K, z_RD.shape[1])
    if gates_TK is not None:
        z_TKD = z_TKD * gates_TK.unsqueeze(-1)
    return z_TKD.sum(1).to(x_TD.dtype)


def _take(x: Tensor, index_R: Tensor, inverse_R: Tensor, per_row: int) -> Tensor:
    rows: Tensor = _Take.apply(x, index_R, inverse_R, per_row)  # type: ignore[no-untyped-call]
    return rows


def _dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in here."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype
