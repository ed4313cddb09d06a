"""For which calls the CPU's backends have code: the reasons why not that several of them share.

Nothing is compiled here.

Shapes: D d_model, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchable.compute.activations import RELU_TYPES
from switchable.compute.call import ExpertCall
from switchable.compute.cpu.llvm import this_machine
from switchable.compute.eager import eager
from switchable.errors import InputError

LANE_BYTES = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 4, torch.float16: 4}
"""Of a lane of a vector, by the dtype that is computed in: sums are at least float32."""
PYTHON_IDS = 64
"""Up to so many are looked through faster in Python than in operations of torch."""


def why_not_relu_on_cpu(call: ExpertCall) -> str | None:
    """Return None, or why a call is none of an FFN that our own CPU code computes."""
    if call.x_TD.device.type != "cpu":
        return f"computes on the CPU, and x is on {call.x_TD.device}"
    if call.activation not in RELU_TYPES:
        return f"computes the activations {' and '.join(RELU_TYPES)}, not {call.activation}"
    return why_not_in_memory(call.x_TD, *call.weights.tensors)


def why_not_in_memory(*tensors: Tensor) -> str | None:
    """Return None, or why compiled code cannot read tensors: subclasses that hold others have no memory of their own.

    Among them are quantised weights (torchao) and DTensors.
    """
    for tensor in tensors:
        if not tensor.data_ptr() and tensor.numel():
            return f"reads memory, and a {type(tensor).__name__} has none of its own"
    return None


@eager
def why_no_loops(d_model: int, dtype: torch.dtype) -> str | None:
    """Return None if loops can be compiled here for rows of `d_model` numbers, or the reason why not."""
    if (machine := this_machine()) is None:
        return "needs a processor with fused multiply-add on vectors (AVX2, AVX-512 or ARM64)"
    lanes = machine.vector_bytes // LANE_BYTES[dtype]
    return f"needs a d_model that is a multiple of {lanes}, not {d_model}" if d_model % lanes else None


def has_pairs() -> bool:
    """Return whether the processor has an instruction for products of bfloat16, which torch's library uses too."""
    machine = this_machine()
    return machine is not None and machine.pairs


def has_tiles() -> bool:
    """Return whether the processor multiplies bfloat16 by tiles (AMX)."""
    machine = this_machine()
    return machine is not None and machine.amx is not None


def check_ids(expert_ids_TK: Tensor, num_experts: int) -> None:
    """Raise InputError unless all ids are in [0, num_experts): compiled code would read and write elsewhere."""
    if number := expert_ids_TK.numel():
        in_python = number <= PYTHON_IDS and expert_ids_TK.is_contiguous()
        ids = expert_ids_TK.view(-1).tolist() if in_python else [int(end) for end in expert_ids_TK.aminmax()]
        low, high = min(ids), max(ids)
        if low < 0 or high >= num_experts:
            raise InputError(f"expert ids must be in 0..{num_experts - 1}; found {low} to {high}")
