"""A few tokens without gradients, in one call of compiled code: what `decode` does where it can.

Reading weights is all that costs time then, and calls: a layer of a small model takes less time than ten operations
of torch. So one function does it all, the router's scores, its choice, the chosen experts' `up`, and of `down` the rows
of neurons that fire:

    s_t = R · x_t + r;  e_t1..K = the K highest;  h_t = relu(up_e · x_t + b);  y_t = c + Σ_{h_ti ≠ 0} h_ti · down_i

Experts are the outer loop, so that one that several tokens chose is read once. With several threads, and enough to
read, experts are tasks, then ranges of columns of `down`.

ReLU and squared ReLU, float32, gates of 1, up to 63 tokens.

Shapes: T tokens, D d_model, E experts, I neurons per expert, F = E·I, K experts per token.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.ffn.experts.cpu import FAST_ACTIVATIONS
from switchable.ffn.experts.few_kernels import FEW, FewKernels, Sizes
from switchable.ffn.experts.llvm import Code, Machine, compile_module, this_machine
from switchable.ffn.experts.selection import MOST_EXPERTS
from switchable.ffn.experts.weights import FFNWeights

MOST_TOKENS = 63
"""A set of tokens is a word of 64 bits."""
WORTH_THREADS = 2**19
"""Bytes of chosen experts from which several threads are faster than one."""


def serves(d_model: int, num_experts: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether there is code for layers of these sizes."""
    machine = this_machine()
    return (
        machine is not None
        and dtype == torch.float32
        and activation in FAST_ACTIVATIONS
        and d_model % (machine.vector_bytes // 4) == 0
        and num_experts <= MOST_EXPERTS
    )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def few_tokens(
    x_TD: Tensor,
    weights: FFNWeights,
    choice: Tensor | tuple[Tensor, Tensor],
    num_experts: int,
    experts_per_token: int,
    *,
    activation: str,
    start_D: Tensor | None = None,
) -> Tensor | None:
    """Return y_TD without gradients, or None where there is no code for the case.

    Args:
        x_TD: one row per token.
        weights: of an FFN that is not gated.
        choice: ids_TK, int64, in [0, num_experts); or the weight [E, D] and bias [E] of a router that chooses.
        num_experts: E.
        experts_per_token: K.
        activation: its name.
        start_D: what is added to every row: the bias of the output projection.
    """
    (tokens, d_model), d_ff = x_TD.shape, len(weights.up_FD)
    router = choice if isinstance(choice, tuple) else ()
    tensors = (x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F, start_D, *router)
    if (
        not 0 < tokens <= MOST_TOKENS
        or not serves(d_model, num_experts, x_TD.dtype, activation)
        or not all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    ):
        return None
    code = _code(
        d_model,
        d_ff // num_experts,
        num_experts,
        experts_per_token,
        activation == "relu2",
        weights.up_bias_F is not None,
        start_D is not None,
        cast(Machine, this_machine()),
    )
    y_TD = torch.empty_like(x_TD)
    scores, pairs = tokens * num_experts, tokens * experts_per_token
    scratch = torch.empty(2 * (num_experts + pairs) + scores + tokens * d_ff)
    chosen = scratch.data_ptr()
    ids = chosen + 8 * num_experts  # two of those numbers each
    floats = ids + 8 * pairs
    fields: dict[str, Tensor | int | None] = {
        "tokens": tokens,
        "x": x_TD,
        "router": router[0] if router else 0,
        "router_bias": router[1] if router else 0,
        "scores": floats,
        "ids": ids if router else cast(Tensor, choice).contiguous(),
        "chosen": chosen,
        "up": weights.up_FD,
        "bias": weights.up_bias_F,
        "hidden": floats + 4 * scores,
        "down": weights.down_FD,
        "start": start_D,
        "y": y_TD,
    }
    entry, threads = "routed" if router else "given", torch.get_num_threads()
    visits = min(tokens * experts_per_token, num_experts)
    if threads == 1 or visits * (d_ff // num_experts) * d_model * 8 < WORTH_THREADS:
        FEW.run(code, f"{entry}_alone", 1, **fields)
    else:
        FEW.run(code, entry, 1, num_experts, threads, **fields)
    return y_TD


@functools.cache
def _code(
    d_model: int,
    neurons: int,
    experts: int,
    chosen: int,
    squared: bool,
    bias: bool,
    start: bool,
    machine: Machine,
) -> Code:
    module = ir.Module("few")
    FewKernels(module, Sizes(d_model, neurons, experts, chosen, squared, bias, start), machine)
    return compile_module(module, machine)
