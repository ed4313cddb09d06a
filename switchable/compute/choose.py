"""Expert compute by name: the same function, `y_t = Σ_k gate_tk · FFN_e(t,k)(x_t)`, computed in different ways.

`eager` is the reference; the others exist because they are faster somewhere. Names shared with transformers
(`eager`, `grouped_mm`, `batched_mm`) mean the same there. On the CPU, `fused` is for training and prefill, `sorted`
for what `fused` cannot do, `decode` for a few tokens without gradients, `masked` for tokens that together need most
experts; on CUDA, `triton` (and `triton_atomic`, which adds up in any order) and `torch_grouped_mm`; `auto` picks one
of them (docs/experts.md).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from switchable.compute.autotune import auto
from switchable.compute.call import ExpertCall
from switchable.compute.cpu.decode.decode import decode
from switchable.compute.cpu.experts.fused import fused
from switchable.compute.cpu.sorted import sorted_experts
from switchable.compute.cuda.grouped_mm import torch_grouped_mm
from switchable.compute.cuda.triton.path import triton_atomic, triton_ffn
from switchable.compute.masked import masked
from switchable.compute.reference import eager
from switchable.compute.transformers_mm import batched_mm, grouped_mm
from switchable.compute.weights import FFNWeights
from switchable.errors import InputError, nearest

__all__ = ["IMPLEMENTATIONS", "ExpertCall", "ExpertCompute", "FFNWeights", "expert_ffn"]


ExpertCompute = Callable[[ExpertCall], Tensor]
"""What all implementations are."""

IMPLEMENTATIONS: dict[str, ExpertCompute] = {
    "eager": eager,
    "fused": fused,
    "sorted": sorted_experts,
    "decode": decode,
    "masked": masked,
    "grouped_mm": grouped_mm,
    "batched_mm": batched_mm,
    "triton": triton_ffn,
    "triton_atomic": triton_atomic,
    "torch_grouped_mm": torch_grouped_mm,
    "auto": auto,
}


def check_implementation(name: str) -> None:
    """Raise InputError if there is no implementation of that name."""
    if name not in IMPLEMENTATIONS:
        raise InputError(
            f"expert compute {name!r} is not known; use one of {', '.join(IMPLEMENTATIONS)}"
            + nearest(name, IMPLEMENTATIONS)
        )


def expert_ffn(
    x_TD: Tensor,
    weights: FFNWeights,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None = None,
    *,
    num_experts: int,
    activation: str = "relu",
    unit_gates: bool = False,
    implementation: str = "eager",
) -> Tensor:
    """Apply to each token its own K experts and add them up.

    Args:
        x_TD: the FFN's input, one row per token, any strides.
        weights: the FFN's weights, neurons in cluster order.
        expert_ids_TK: the selected experts, distinct within a row, int64 in [0, num_experts).
        gates_TK: the factor of each selected expert, or None for 1. Gradients flow to it.
        num_experts: E; divides F.
        activation: a name in transformers' `ACT2FN`.
        unit_gates: promises that every gate *is* 1 (straight-through gates): the multiplication may be left out;
            the gates' gradient is still computed.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        y_TD, without the bias of the output projection.

    Raises:
        InputError: unknown implementation.
    """
    check_implementation(implementation)
    call = ExpertCall(x_TD, weights, expert_ids_TK, gates_TK, num_experts, activation, unit_gates)
    return IMPLEMENTATIONS[implementation](call)
