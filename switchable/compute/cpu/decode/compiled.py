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

from switchable.compute.cpu.decode.kernels import FEW, FewKernels, Sizes
from switchable.compute.cpu.llvm import Code, Machine, compile_module, this_machine
from switchable.compute.cpu.sorted import FAST_ACTIVATIONS
from switchable.compute.cpu.tasks import Run
from switchable.compute.cpu.topk import MOST_EXPERTS
from switchable.compute.weights import FFNWeights

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
    if not takes(x_TD):
        return None
    call = prepared(
        len(x_TD), weights, choice, num_experts, experts_per_token, activation=activation, start_D=start_D
    )
    return None if call is None else call(x_TD)


def takes(x: Tensor) -> bool:
    """Whether a `FewCall` could be given x."""
    return x.dtype is torch.float32 and x.is_contiguous()


class FewCall:
    """`few_tokens` with everything looked up but x; by one Python thread at a time."""

    def __init__(self, run: Run, *memory: Tensor):
        self.run, self.memory = run, memory
        self.x, self.y = (run.places[name] for name in ("x", "y"))

    def __call__(self, x: Tensor) -> Tensor:
        """Return y, of x's shape; `takes(x)` must hold, and its number of tokens be the one prepared for."""
        y = torch.empty_like(x)
        self.run.record[self.x], self.run.record[self.y] = x.data_ptr(), y.data_ptr()
        self.run()
        return y


def prepared(
    tokens: int,
    weights: FFNWeights,
    choice: Tensor | tuple[Tensor, Tensor],
    num_experts: int,
    experts_per_token: int,
    *,
    activation: str,
    start_D: Tensor | None,
) -> FewCall | None:
    """Return what `few_tokens` does for a number of tokens, as long as the weights stay where they are."""
    d_ff, d_model = weights.up_FD.shape
    router = choice if isinstance(choice, tuple) else ()
    tensors = (weights.up_FD, weights.down_FD, weights.up_bias_F, start_D, *router)
    if (
        not 0 < tokens <= MOST_TOKENS
        or not serves(d_model, num_experts, weights.up_FD.dtype, activation)
        or not all(t is None or takes(t) for t in tensors)
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
    scores, pairs = tokens * num_experts, tokens * experts_per_token
    scratch = torch.empty(2 * (num_experts + pairs) + scores + tokens * d_ff)
    given_TK = scratch if router else cast(Tensor, choice).contiguous()
    chosen = scratch.data_ptr()
    ids = chosen + 8 * num_experts  # two of those numbers each
    floats = ids + 8 * pairs
    fields: dict[str, Tensor | int | None] = {
        "tokens": tokens,
        "router": router[0] if router else 0,
        "router_bias": router[1] if router else 0,
        "scores": floats,
        "ids": ids if router else given_TK,
        "chosen": chosen,
        "up": weights.up_FD,
        "bias": weights.up_bias_F,
        "hidden": floats + 4 * scores,
        "down": weights.down_FD,
        "start": start_D,
    }
    entry, threads = "routed" if router else "given", torch.get_num_threads()
    visits = min(pairs, num_experts)
    alone = threads == 1 or visits * (d_ff // num_experts) * d_model * 8 < WORTH_THREADS
    run = Run(
        FEW, code, f"{entry}_alone" if alone else entry, (1,) if alone else (1, num_experts, threads), fields
    )
    return FewCall(run, scratch, given_TK)


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
