"""Which experts a token needs, told by the FFN itself: its first products, in 8 bits.

    mass_e = Σ_{i in e} |a_i| · ‖down_i‖,      a from x and `up` (and the gate), rounded to 8 bits by rows

No router has to have learned anything. The choice catches the activation mass that the best one does, to three digits
(docs/log/quality.md). In training it costs one product more beside six (gated: two beside nine), at half their price.

Shapes: T tokens, D d_model, F d_ff, E experts.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from switchable.compute.activations import activation_named
from switchable.compute.call import FFNWeights
from switchable.compute.cpu.decode.rows import quantised
from switchable.compute.cpu.limits import has_pairs
from switchable.compute.eager import eager

AT_ONCE = 256
"""Tokens whose products stay in a CPU's cache."""
CUDA_MULTIPLE, CUDA_ROWS = 8, 17
"""CUDA's products in 8 bits want sizes that are multiples of the one, and the other or more tokens."""


def expert_mass(hidden_TF: Tensor, down_FD: Tensor, num_experts: int) -> Tensor:
    """Return mass_TE, the activation mass of each expert: Σ over its neurons of |a_i| · ‖down_i‖."""
    return _summed(hidden_TF, down_FD.float().norm(dim=1), num_experts)


@eager
@torch.no_grad()
def estimated_mass(x_TD: Tensor, weights: FFNWeights, activation: str, num_experts: int) -> Tensor:
    """Return about what `expert_mass` does for the activations of tokens, in float32.

    A token's row depends on that token alone.
    """
    act, norms_F = activation_named(activation), weights.down_FD.float().norm(dim=1)
    read = _Product(weights.up_FD, weights.up_bias_F)
    gate = None if weights.gate_FD is None else _Product(weights.gate_FD, weights.gate_bias_F)

    def mass(rows_TD: Tensor, scale_T: Tensor) -> Tensor:
        up_TF = read(rows_TD, scale_T)
        hidden_TF = act(up_TF) if gate is None else act(gate(rows_TD, scale_T)) * up_TF
        return _summed(hidden_TF, norms_F, num_experts)

    rows_TD, scale_T = quantised(x_TD)
    at_once = AT_ONCE if x_TD.device.type == "cpu" else max(1, len(x_TD))
    parts = [slice(first, first + at_once) for first in range(0, max(1, len(x_TD)), at_once)]
    return torch.cat([mass(rows_TD[some], scale_T[some]) for some in parts])


class _Product:
    """x · Wᵀ + bias, of what is rounded to 8 bits."""

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None) -> None:
        self.rows_FD, self.scale_F = quantised(weight_FD)
        self.bias_F = bias_F

    def __call__(self, rows_TD: Tensor, scale_T: Tensor) -> Tensor:
        sums_TF = product(rows_TD, self.rows_FD).float().mul_(self.scale_F).mul_(scale_T.unsqueeze(1))
        return sums_TF if self.bias_F is None else sums_TF.add_(self.bias_F)


def product(rows_TD: Tensor, rows_FD: Tensor) -> Tensor:
    """Return the products of rows in 8 bits: whole numbers, in float32 where the device has no such product."""
    kind, sizes = rows_TD.device.type, (*rows_TD.shape, len(rows_FD))
    fits = len(rows_TD) >= CUDA_ROWS and not any(size % CUDA_MULTIPLE for size in sizes[1:])
    if (kind == "cpu" and _is_exact_on_cpu()) or (kind == "cuda" and fits):
        return torch._int_mm(rows_TD, rows_FD.t())
    return in_float32(rows_TD, rows_FD)


@functools.cache
def _is_exact_on_cpu() -> bool:
    """Whether torch's product is: without VNNI instructions it adds pairs up in 16 bits, which do not hold them."""
    rows = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(rows, rows.t()) == 64 * 127 * 127).all())


def in_float32(rows_TD: Tensor, rows_FD: Tensor) -> Tensor:
    """Return the products of rows in 8 bits, multiplied in float32."""
    return rows_TD.float() @ rows_FD.float().t()


def _summed(hidden_TF: Tensor, norms_F: Tensor, num_experts: int) -> Tensor:
    neurons = hidden_TF.shape[1] // num_experts
    half = hidden_TF.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    if half and (hidden_TF.is_cuda or has_pairs()):
        # A product with mostly zeros, a third of what passes through memory take.
        norms_EEI = hidden_TF.new_zeros(num_experts, num_experts, neurons)
        norms_EEI.diagonal(dim1=0, dim2=1).copy_(norms_F.view(num_experts, neurons).t())
        return (hidden_TF.abs() @ norms_EEI.view(num_experts, -1).t()).float()
    return (hidden_TF * norms_F).abs_().view(-1, num_experts, neurons).sum(dim=-1).float()
