"""Shapes, buffers, grids: one call of the sparse FFN's Triton kernels, nothing of autograd.

Grids are upper bounds that follow from shapes: R rows of E experts fill at most (R + E'·(BLOCK_M - 1)) /
BLOCK_M blocks, E' = min(E, R) being the experts that can have rows at all; programs beyond the real count
leave at once.

Needs triton: imported only through `triton_path`.
Shapes: T tokens, D d_model, F d_ff, E experts, I = F/E neurons, K experts per token, R = T·K rows in expert
order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from switchable.compute.cuda.triton import kernels, tuning
from switchable.compute.cuda.triton.sort import Rows, sort_by_expert

__all__ = ["Call", "Rows", "by_rows", "sort_by_expert"]


def by_rows(x: Tensor) -> Tensor:
    """Return x with contiguous rows: the kernels take any row stride, also that of an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Call:
    """The sizes of one call, and its launches."""

    def __init__(
        self, x_TD: Tensor, up_FD: Tensor, expert_ids_TK: Tensor, num_experts: int, *, atomic: bool
    ) -> None:
        self.T, self.D = x_TD.shape
        self.K, self.E = expert_ids_TK.shape[1], num_experts
        self.R, self.I = self.T * self.K, up_FD.shape[0] // num_experts
        self.dtype = x_TD.dtype
        self.atomic = atomic
        self.bucket = tuning.bucket_of(self.R, num_experts)
        exact = x_TD.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        self.precision = {"PRECISION": "ieee" if exact else "tf32"}  # says nothing of 16-bit operands
        self.sizes = {"D": self.D, "I": self.I, "K": self.K}
        self.experts = {"E": num_experts, "BLOCK_E": max(16, triton.next_power_of_2(num_experts))}

    def _row_grid(self, columns: int) -> Any:
        experts = min(self.E, self.R)

        def grid(block: dict[str, int]) -> tuple[int]:
            blocks = (self.R + experts * (block["BLOCK_M"] - 1)) // block["BLOCK_M"]
            return (blocks * triton.cdiv(columns, block["BLOCK_N"]),)

        return grid

    def up(self, x_TD: Tensor, up_FD: Tensor, bias_F: Tensor | None, rows: Rows, *, squared: bool) -> Tensor:
        """Return the hidden rows after the activation [R, I]."""
        x_TD = by_rows(x_TD)
        h_RI = x_TD.new_empty(self.R, self.I)
        kernels.up_kernel[self._row_grid(self.I)](
            x_TD,
            x_TD.stride(0),
            up_FD,
            *up_FD.stride(),
            None if bias_F is None else bias_F.contiguous(),
            h_RI,
            rows.order_R,
            rows.ends_E,
            self.bucket,
            **self.sizes,
            **self.experts,
            **self.precision,
            SQUARED=squared,
            HAS_BIAS=bias_F is not None,
        )
        return h_RI

    def down(self, h_RI: Tensor, down_FD: Tensor, gates_TK: Tensor | None, rows: Rows) -> Tensor:
        """Return Σ_k γ_tk · down_eᵀ h of each token [T, D]."""
        shape = (self.T, self.D) if self.atomic else (self.R, self.D)
        out = h_RI.new_zeros(shape, dtype=torch.float32) if self.atomic else h_RI.new_empty(shape)
        kernels.down_kernel[self._row_grid(self.D)](
            h_RI,
            down_FD,
            *down_FD.stride(),
            None if gates_TK is None else gates_TK.contiguous(),
            out,
            rows.order_R,
            rows.ends_E,
            self.bucket,
            **self.sizes,
            **self.experts,
            **self.precision,
            GATED=gates_TK is not None,
            ATOMIC=self.atomic,
        )
        if self.atomic:
            # Never the buffer itself when it is float32 already: it is not used again.
            return out.to(self.dtype)
        y_TD = h_RI.new_empty(self.T, self.D)
        block = min(1024, triton.next_power_of_2(self.D))
        grid = (self.T, triton.cdiv(self.D, block))
        kernels.combine_kernel[grid](out, y_TD, rows.position_R, D=self.D, K=self.K, BLOCK_D=block)
        return y_TD

    def hidden_grad(
        self,
        grad_TD: Tensor,
        down_FD: Tensor,
        h_RI: Tensor,
        gates_TK: Tensor | None,
        rows: Rows,
        *,
        squared: bool,
        gate_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradient before the activation, the hidden rows times gates, the gates' gradient."""
        grad_TD = by_rows(grad_TD)
        a_RI = torch.empty_like(h_RI)
        scaled_RI = h_RI if gates_TK is None else torch.empty_like(h_RI)
        parts = triton.cdiv(self.I, tuning.SMALLEST_N)
        parts_PR = h_RI.new_empty(parts, self.R, dtype=torch.float32) if gate_grad else None
        kernels.hidden_grad_kernel[self._row_grid(self.I)](
            grad_TD,
            grad_TD.stride(0),
            down_FD,
            *down_FD.stride(),
            h_RI,
            None if gates_TK is None else gates_TK.contiguous(),
            a_RI,
            scaled_RI,
            parts_PR,
            rows.order_R,
            rows.ends_E,
            self.R,
            self.bucket,
            **self.sizes,
            **self.experts,
            **self.precision,
            SQUARED=squared,
            GATED=gates_TK is not None,
            GATE_GRAD=gate_grad,
            PARTS=parts,
        )
        return a_RI, scaled_RI, None if parts_PR is None else parts_PR.sum(0)

    def weight_grad(self, p_RI: Tensor, x_TD: Tensor, weight_FD: Tensor, rows: Rows) -> Tensor:
        """Return Σ_r p_r x_token(r)ᵀ for every expert [F, D], laid out in memory as the weight is."""
        x_TD = by_rows(x_TD)
        out_FD = torch.empty_like(weight_FD)

        def grid(block: dict[str, int]) -> tuple[int]:
            return (self.E * triton.cdiv(self.I, block["BLOCK_M"]) * triton.cdiv(self.D, block["BLOCK_N"]),)

        kernels.weight_grad_kernel[grid](
            p_RI,
            x_TD,
            x_TD.stride(0),
            out_FD,
            *out_FD.stride(),
            rows.order_R,
            rows.ends_E,
            self.bucket,
            **self.sizes,
            **self.precision,
        )
        return out_FD

    def bias_grad(self, a_RI: Tensor, rows: Rows) -> Tensor:
        """Return Σ_r a_r for every expert [F]."""
        out_F = a_RI.new_empty(self.E * self.I)
        grid = (self.E, triton.cdiv(self.I, 32))
        kernels.bias_grad_kernel[grid](a_RI, out_F, rows.ends_E, I=self.I, BLOCK_I=32, BLOCK_R=64)
        return out_F
