"""The sparse FFN on CUDA: Triton kernels behind two `torch.library` operators.

`triton_ffn` computes what `eager` computes, with four launches forward (sort, up, down, combine; two more
to sort large batches) and at most seven backward. Its operators are opaque to `torch.compile` and have
fakes for tracing. Every size follows from shapes, so nothing waits for the GPU, and decoding can be
captured in a CUDA graph once the shape has run (the first run compiles and tunes). The result of the down
projection is written per (token, slot) and summed in a fixed order: repeated calls give identical bits.
`triton_atomic` instead adds in place, in float32 and in no order.

Saved for the backward: the input, the hidden rows after the activation [R, I] and three integer vectors.
What the kernels do not cover (gated FFNs, activations but relu and relu2, float64, no tokens) goes to
`eager`.

Shapes: T tokens, D d_model, F d_ff, E experts, I = F/E neurons, K experts per token, R = T·K rows in expert
order.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from switchable.compute.call import ExpertCall
from switchable.compute.reference import eager
from switchable.compute.weights import FFNWeights
from switchable.errors import InputError

ACTIVATIONS = ("relu", "relu2")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_ffn(call: ExpertCall, atomic: bool = False) -> Tensor:
    """Return y_TD.

    Args:
        call: what to compute.
        atomic: add the experts' outputs up by atomic additions: less memory, but the order of sums varies.

    Raises:
        InputError: no triton, a tensor on the CPU (unless `TRITON_INTERPRET=1`), or mixed dtypes.
    """
    x, up, down, bias = _autocast(call.x_TD, call.weights)
    covered = (
        call.weights.gate_FD is None
        and call.activation in ACTIVATIONS
        and x.dtype in DTYPES
        and call.expert_ids_TK.numel() > 0
    )
    if not covered:
        return eager(call)
    _check(x, up, down, bias, call.num_experts)
    outputs = _forward(
        x,
        up,
        down,
        bias,
        call.expert_ids_TK,
        call.gates_TK,
        call.num_experts,
        call.activation == "relu2",
        call.unit_gates,
        atomic,
    )
    y_TD: Tensor = outputs[0]
    return y_TD.to(call.x_TD.dtype)


def triton_atomic(call: ExpertCall) -> Tensor:
    """`triton_ffn` with atomic sums: not reproducible to the bit."""
    return triton_ffn(call, atomic=True)


def _autocast(x_TD: Tensor, weights: FFNWeights) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return input and weights in the dtype that a linear layer would compute in here."""
    x, up, down, bias = x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return x, up, down, bias


def _check(x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, num_experts: int) -> None:
    dtypes = {t.dtype for t in (x, up, down, bias) if t is not None}
    if len(dtypes) > 1:
        raise InputError(
            f"input and weights have the dtypes {', '.join(sorted(map(str, dtypes)))}; "
            "convert them to one, or use torch.autocast"
        )
    if up.shape[0] % num_experts:
        raise InputError(f"num_experts={num_experts} does not divide d_ff={up.shape[0]}")


def _launcher(x: Tensor) -> ModuleType:
    """Import the launches when first needed: torch's CUDA builds bring triton, its CPU builds do not."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"implementation='triton' needs a CUDA device, and x is on {x.device}; use 'eager' or 'auto'"
        )
    try:
        from switchable.compute.cuda.triton import launch as triton_launch
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise InputError(
            "implementation='triton' needs triton; pip install triton, or use 'eager' or 'auto'"
        ) from error
    return triton_launch


@torch.library.custom_op("switchable::sparse_ffn", mutates_args=())
def _forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    gates: Tensor | None,
    num_experts: int,
    squared: bool,
    unit_gates: bool,
    atomic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y_TD and what the backward needs: h_RI, order_R, position_R, ends_E."""
    launch = _launcher(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        call = launch.Call(x, up, ids, num_experts, atomic=atomic)
        rows = launch.sort_by_expert(ids, num_experts)
        h_RI = call.up(x, up, bias, rows, squared=squared)
        y_TD = call.down(h_RI, down, None if unit_gates else gates, rows)
    return y_TD, h_RI, *rows


@_forward.register_fake
def _(
    x: Tensor,
    up: Tensor,
    down: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    ids: Tensor,
    gates: Tensor | None,  # noqa: ARG001
    num_experts: int,
    squared: bool,  # noqa: ARG001
    unit_gates: bool,  # noqa: ARG001
    atomic: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = ids.numel()
    order_R = ids.new_empty(rows, dtype=torch.int32)
    h_RI = x.new_empty(rows, up.shape[0] // num_experts)
    return x.new_empty(x.shape), h_RI, order_R, torch.empty_like(order_R), order_R.new_empty(num_experts)


@torch.library.custom_op("switchable::sparse_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    ids: Tensor,
    gates: Tensor | None,
    saved: list[Tensor],
    num_experts: int,
    squared: bool,
    unit_gates: bool,
    atomic: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, up, down, bias and gates; an empty tensor for each that is not wanted."""
    launch = _launcher(x)
    h_RI, *sorted_rows = saved
    real = None if unit_gates else gates
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        call = launch.Call(x, up, ids, num_experts, atomic=atomic)
        rows = launch.Rows(*sorted_rows)
        a_RI, scaled_RI, d_gates = call.hidden_grad(
            grad, down, h_RI, real, rows, squared=squared, gate_grad=wanted[4]
        )
        return (
            call.down(a_RI, up, None, rows) if wanted[0] else x.new_empty(0),
            call.weight_grad(a_RI, x, up, rows) if wanted[1] else x.new_empty(0),
            call.weight_grad(scaled_RI, grad, down, rows) if wanted[2] else x.new_empty(0),
            call.bias_grad(a_RI, rows) if wanted[3] else x.new_empty(0),
            x.new_empty(0) if gates is None or d_gates is None else d_gates.view(gates.shape).to(gates.dtype),
        )


@_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    x: Tensor,
    up: Tensor,
    down: Tensor,
    ids: Tensor,  # noqa: ARG001
    gates: Tensor | None,
    saved: list[Tensor],  # noqa: ARG001
    num_experts: int,  # noqa: ARG001
    squared: bool,  # noqa: ARG001
    unit_gates: bool,  # noqa: ARG001
    atomic: bool,  # noqa: ARG001
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if wanted[0] else x.new_empty(0),
        torch.empty_like(up) if wanted[1] else x.new_empty(0),
        torch.empty_like(down) if wanted[2] else x.new_empty(0),
        x.new_empty(up.shape[0]) if wanted[3] else x.new_empty(0),
        x.new_empty(0) if gates is None or not wanted[4] else gates.new_empty(gates.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, down, _, ids, gates, *ctx.options = inputs
    ctx.save_for_backward(x, up, down, ids, gates, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _apply_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, up, down, ids, gates, *saved = ctx.saved_tensors
    of_x, of_up, of_down, of_bias, _ids, of_gates, *_options = ctx.needs_input_grad
    wanted = [of_x, of_up, of_down, of_bias, of_gates]
    grads = _backward(grad, x, up, down, ids, gates, saved, *ctx.options, wanted)
    dx, d_up, d_down, d_bias, d_gates = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return dx, d_up, d_down, d_bias, None, d_gates, None, None, None, None


_forward.register_autograd(_apply_backward, setup_context=_setup_context)
