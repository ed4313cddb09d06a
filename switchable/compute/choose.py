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
    "reference": eager,
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


def check_backend(name: str) -> None:
    """Raise InputError if there is no backend of that name."""
    if name not in IMPLEMENTATIONS:
        raise InputError(
            f"backend {name!r} is not known; use one of {', '.join(IMPLEMENTATIONS)}"
            + nearest(name, IMPLEMENTATIONS)
        )


def expert_ffn(call: ExpertCall, backend: str = "auto") -> Tensor:
    check_backend(backend)
    return IMPLEMENTATIONS[backend](call)
