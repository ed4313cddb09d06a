"""Buffers, grids, launches: forward and backward of the sparse FFN on plain tensors, nothing of autograd.

    forward:  rows = sort(ids);   h = up(x);   y = combine(down(h))
    backward: a = hidden_grad(g, h);   ∂x = combine(down(a)) with upᵀ;   ∂up, ∂down = weight_grad;   ∂bias = bias_grad

The kernels' own equations stand in `kernels.py`. Grids are upper bounds that follow from shapes: R rows of E experts
fill at most (R + E'·(BLOCK_M - 1)) / BLOCK_M blocks, E' = min(E, R) being the experts that can have rows at all.
Programs beyond the real count leave at once.

Shapes: T tokens, D d_model, F d_ff, E experts, I = F/E neurons, K experts per token, R = T·K rows in expert order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from switchable.compute.cuda.sort import Rows, sort_by_expert
from switchable.compute.cuda.triton import kernels, tuning


def forward(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, bias_F: Tensor | None, ids_TK: Tensor, E: int, squared: bool
) -> tuple[Tensor, Tensor, Rows]:
    """Return y_TD, the hidden rows after the activation h_RI, and the sorted rows."""
    rows = sort_by_expert(ids_TK, E)
    launches = _Launches(x_TD, up_FD, rows)
    h_RI = launches.multiply("up", x_TD, up_FD, bias_F=bias_F, squared=squared)
    return launches.multiply_back(h_RI, down_FD), h_RI, rows


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    h_RI: Tensor,
    rows: Rows,
    squared: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of those of x, up, down and bias that are wanted, in this order."""
    launches = _Launches(x_TD, up_FD, rows)
    # The gradient before the activation; of the four, only the gradient of down does without.
    a_RI = launches.multiply("hidden_grad", grad_TD, down_FD, h_RI=h_RI, squared=squared)
    gradients: tuple[Callable[[], Tensor], ...] = (
        lambda: launches.multiply_back(a_RI, up_FD),
        lambda: launches.weight_grad(a_RI, x_TD, up_FD),
        lambda: launches.weight_grad(h_RI, grad_TD, down_FD),
        lambda: launches.bias_grad(a_RI),
    )
    return [gradient() for gradient, want in zip(gradients, wanted, strict=True) if want]


def _by_rows(x: Tensor) -> Tensor:
    """Return x with contiguous rows: the kernels take any row stride, also that of an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Launches:
    """The sizes of one call, and the launch of every kernel."""

    def __init__(self, x_TD: Tensor, up_FD: Tensor, rows: Rows) -> None:
        self.rows = rows
        self.R, self.E = len(rows.order_R), len(rows.ends_E)
        self.T, self.D = x_TD.shape
        self.I, self.K = len(up_FD) // self.E, self.R // self.T
        exact = x_TD.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.common = {
            "order_ptr": rows.order_R,
            "ends_ptr": rows.ends_E,
            "bucket": tuning.bucket_of(self.R, self.E),
            "K": self.K,
            "PRECISION": "ieee" if exact else "tf32",  # says nothing of 16-bit operands
        }

    def multiply(
        self,
        step: str,
        a: Tensor,
        weight_FD: Tensor,
        *,
        bias_F: Tensor | None = None,
        h_RI: Tensor | None = None,
        squared: bool = False,
    ) -> Tensor:
        """Return every row times its expert's part of a weight: [R, D] in the step "down", else [R, I]."""
        stride_f, stride_d = weight_FD.stride()
        N, depth, stride_n, stride_k = self.I, self.D, stride_f, stride_d
        if step == "down":
            N, depth, stride_n, stride_k = self.D, self.I, stride_d, stride_f
        a = _by_rows(a)
        out_RN = a.new_empty(self.R, N)

        def grid(block: dict[str, int]) -> tuple[int]:
            blocks = (self.R + min(self.E, self.R) * (block["BLOCK_M"] - 1)) // block["BLOCK_M"]
            return (blocks * triton.cdiv(N, block["BLOCK_N"]),)

        weight = (weight_FD, self.I * stride_f, stride_k, stride_n)
        bias_F = None if bias_F is None else bias_F.contiguous()
        sizes = {"N": N, "DEPTH": depth, "E": self.E, "BLOCK_E": max(16, triton.next_power_of_2(self.E))}
        kernels.expert_kernel[grid](
            a, a.stride(0), *weight, bias_F, h_RI, out_RN, **self.common, STEP=step, SQUARED=squared, **sizes
        )
        return out_RN

    def multiply_back(self, rows_RI: Tensor, weight_FD: Tensor) -> Tensor:
        """Return for each token the sum over its K rows, each times its expert's part of the weight [T, D]."""
        z_RD = self.multiply("down", rows_RI, weight_FD)
        y_TD = z_RD.new_empty(self.T, self.D)
        block = min(1024, triton.next_power_of_2(self.D))
        grid = (self.T, triton.cdiv(self.D, block))
        kernels.combine_kernel[grid](z_RD, y_TD, self.rows.position_R, D=self.D, K=self.K, BLOCK_D=block)
        return y_TD

    def weight_grad(self, p_RI: Tensor, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
        """Return Σ_r p_r x_token(r)ᵀ for every expert [F, D], laid out in memory as the weight is."""
        x_TD = _by_rows(x_TD)
        out_FD = torch.empty_like(weight_FD)

        def grid(block: dict[str, int]) -> tuple[int]:
            return (self.E * triton.cdiv(self.I, block["BLOCK_M"]) * triton.cdiv(self.D, block["BLOCK_N"]),)

        kernels.weight_grad_kernel[grid](
            p_RI, x_TD, x_TD.stride(0), out_FD, *out_FD.stride(), **self.common, D=self.D, I=self.I
        )
        return out_FD

    def bias_grad(self, a_RI: Tensor) -> Tensor:
        """Return Σ_r a_r for every expert [F]."""
        out_F = a_RI.new_empty(self.E * self.I)
        grid = (self.E, triton.cdiv(self.I, 32))
        kernels.bias_grad_kernel[grid](a_RI, out_F, self.rows.ends_E, I=self.I, BLOCK_I=32, BLOCK_R=64)
        return out_F
