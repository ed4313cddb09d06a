"""A few tokens without gradients, in one call of compiled code: what `decode` does where it can.

    s_t = R · x_t + r;  e_t1..K = the K highest;  h_t = relu(up_e · x_t + b);  y_t = c + Σ_{h_ti ≠ 0} h_ti · down_i
    gated: h_ti = relu(gate_i · x_t + g) · (up_i · x_t + b), where the first factor is not zero

With few tokens only two things cost time: reading weights, and calls. A layer of a small model takes less time than
ten operations of torch. So one function does it all: the router's scores, its choice, the chosen experts' `up`, and of
`down` the rows of neurons that fire. In a gated FFN the gate is read instead, and of `up` what is read of `down`.

Experts are the outer loop, so that one that several tokens chose is read once. With several threads, and enough to
read, experts are tasks, then ranges of columns of `down`.

Flow: a layer prepares a call and keeps it (`ffn/one_call.py`); `decode.py` prepares one each time. `kernels.py` is what
the call runs.

ReLU and squared ReLU, up to 64 tokens in float32 or bfloat16; weights of any width (`rows.py`). What is computed on the
way is float32.

Shapes: T tokens, D d_model, E experts, I neurons per expert, F = E·I, K experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.activations import RELU_TYPES
from switchable.compute.call import FFNWeights
from switchable.compute.cpu.code import Code
from switchable.compute.cpu.decode.kernels import DECODE, DecodeKernels, Sizes
from switchable.compute.cpu.decode.norm import Norm
from switchable.compute.cpu.decode.rows import NUMBERS, TYPES
from switchable.compute.cpu.limits import why_no_loops, why_not_in_memory
from switchable.compute.cpu.llvm import Machine, this_machine
from switchable.compute.cpu.tasks import Run, floats
from switchable.compute.cpu.topk import MOST_EXPERTS

MOST_TOKENS = 64
"""A set of tokens is a word of 64 bits."""
FEW_TOKENS = 32
"""Up to so many it is faster than `fused`, which puts weights in order: 24 to 48, with D 128 to 768 and E 8 to 128."""
WORTH_THREADS = 2**19
"""Bytes of chosen experts from which several threads are faster than one."""


def has_code(d_model: int, num_experts: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether there is code for layers of these sizes; compiles nothing."""
    return (
        dtype in TYPES
        and activation in RELU_TYPES
        and num_experts <= MOST_EXPERTS
        and why_no_loops(d_model, torch.float32) is None  # what it is computed in
    )


def _shared_dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """Return the dtype of tensors, float32 if there are none; None if they differ, or do not lie in rows in memory."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.dtype for tensor in given} or {torch.float32}
    readable = all(tensor.is_contiguous() for tensor in given) and why_not_in_memory(*given) is None
    return dtypes.pop() if len(dtypes) == 1 and readable else None


def fits(tokens: int, weights: FFNWeights, num_experts: int, activation: str) -> bool:
    """Whether there is code for so many tokens of an FFN; compiles nothing."""
    dtype = _shared_dtype(weights.up_FD, weights.down_FD, weights.gate_FD)
    return (
        0 < tokens <= MOST_TOKENS
        and dtype is not None
        and has_code(weights.up_FD.shape[1], num_experts, dtype, activation)
        and _shared_dtype(weights.up_bias_F, weights.gate_bias_F) in NUMBERS
    )


class DecodeCall:
    """A call with everything looked up but x; to be used by one Python thread at a time."""

    def __init__(self, run: Run, *memory: Tensor | None):
        self.run, self.memory = run, memory
        self.x, self.add, self.y = (run.places[name] for name in ("x", "add", "y"))

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return y, of x's shape and dtype; x must have the number of tokens prepared for.

        `add` is what a call prepared with `adds` gets besides, of the same shape, float32 and contiguous.
        """
        wide = x.float().contiguous()
        y = torch.empty_like(wide)
        self.told(wide, y, add)()
        return y.to(x.dtype)

    def told(self, x: Tensor, y: Tensor, add: Tensor | None = None) -> Run:
        """Return what writes y; all float32 and contiguous."""
        record = self.run.record
        record[self.x], record[self.y] = x.data_ptr(), y.data_ptr()
        if add is not None:
            record[self.add] = add.data_ptr()
        return self.run


def prepare_call(
    tokens: int,
    weights: FFNWeights,
    choice: Tensor | tuple[Tensor, Tensor],
    num_experts: int,
    experts_per_token: int,
    *,
    activation: str,
    start_D: Tensor | None = None,
    scales: Mapping[str, Tensor] = MappingProxyType({}),
    adds: bool = False,
    mass: float = 1.0,
    norm: Norm | None = None,
) -> DecodeCall | None:
    """Return a call for a number of tokens, as long as the weights stay where they are; None without code for it.

    Matrices share a dtype, and so do biases, and the router's tensors.

    Args:
        tokens: T.
        weights: of an FFN.
        choice: ids_TK, int64, in [0, num_experts], the last of which is no expert; or the weight [E, D] and bias [E]
            of a router that chooses.
        num_experts: E.
        experts_per_token: K.
        activation: its name.
        start_D: what is added to every row: the bias of the output projection.
        scales: of int8 weights, "up_scale", "down_scale", "gate_scale".
        adds: whether a call gets something to add to each row.
        mass: below 1, the router's tokens take the fewest experts whose shares add up to it (`topk.py`).
        norm: of x, before anything else.
    """
    given_TK, router_ED, router_E = None, None, None
    if isinstance(choice, tuple):
        router_ED, router_E = choice
    else:
        given_TK = choice.contiguous()
    router_dtype = _shared_dtype(router_ED, router_E)
    bias_dtype = _shared_dtype(weights.up_bias_F, weights.gate_bias_F, start_D)
    fit = fits(tokens, weights, num_experts, activation)
    if router_dtype not in NUMBERS or bias_dtype not in NUMBERS or not fit:
        return None
    sizes = _sizes(tokens, weights, num_experts, experts_per_token, activation)._replace(
        start=start_D is not None,
        routed=given_TK is None,
        adds=adds,
        mass=mass,
        norm=None if norm is None else norm.kind,
        router_dtype=router_dtype,
        bias_dtype=bias_dtype,
    )
    own = {} if norm is None else norm.fields
    scratch, places = _scratch(tokens, sizes)
    if given_TK is not None:
        places["ids"] = given_TK.data_ptr()
    run = Run(
        DECODE,
        _code(sizes, cast(Machine, this_machine())),
        "decode",
        *((1,) if sizes.alone else (1, num_experts, torch.get_num_threads())),
        tokens=tokens,
        router=router_ED,
        router_bias=router_E,
        start=start_D,
        **_fields(weights),
        **own,
        **places,
        **scales,
    )
    return DecodeCall(run, scratch, given_TK, *own.values())


def _fields(weights: FFNWeights) -> dict[str, Tensor | None]:
    """Those of a call's record."""
    gate = {"gate": weights.gate_FD, "gate_bias": weights.gate_bias_F}
    return {**gate, "up": weights.up_FD, "bias": weights.up_bias_F, "down": weights.down_FD}


def _sizes(
    tokens: int, weights: FFNWeights, num_experts: int, experts_per_token: int, activation: str
) -> Sizes:
    """Return what is compiled for an FFN whose experts are given, all of them counting, with nothing else added."""
    d_ff, d_model = weights.up_FD.shape
    gated, neurons = weights.gate_FD is not None, d_ff // num_experts
    read = min(tokens * experts_per_token, num_experts) * neurons * d_model * (3 if gated else 2)
    return Sizes(
        d_model,
        neurons,
        num_experts,
        experts_per_token,
        squared=activation == "relu2",
        gated=gated,
        gate_bias=weights.gate_bias_F is not None,
        bias=weights.up_bias_F is not None,
        alone=torch.get_num_threads() == 1 or read * weights.up_FD.itemsize < WORTH_THREADS,
        dtype=weights.up_FD.dtype,
    )


def _scratch(tokens: int, sizes: Sizes) -> tuple[Tensor, dict[str, int]]:
    """Return one piece of memory for all that is computed on the way, and where in it each part begins."""
    scores, pairs = tokens * sizes.experts, tokens * sizes.chosen
    # int64 numbers take two float32 places each.
    normed = 0 if sizes.norm is None else tokens * sizes.d_model
    scratch = floats(2 * (sizes.experts + 1 + pairs) + scores + normed + tokens * sizes.d_ff)
    token_sets = scratch.data_ptr()
    ids = token_sets + 8 * (sizes.experts + 1)
    numbers = ids + 8 * pairs
    return scratch, {
        "token_sets": token_sets,
        "ids": ids,
        "scores": numbers,
        "normed": numbers + 4 * scores,
        "hidden": numbers + 4 * (scores + normed),
    }


@functools.cache
def _code(sizes: Sizes, machine: Machine) -> Code:
    module = ir.Module("decode")
    DecodeKernels(module, sizes, machine)
    return Code.of(module, "decode", machine)
