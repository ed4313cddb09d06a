"""The sparse FFN on CUDA by Triton kernels, behind two `torch.library` operators: `TRITON`, by name only.

    call -> `_forward` (sort, up, down, combine) -> y_TD        gradient of y_TD -> `_backward` -> those that are wanted

`torch.compile` and autograd see two operators and nothing of what is within. Every size follows from shapes, so the
host never waits for the GPU, and decoding can be captured in a CUDA graph once the shape has run (the first run
compiles and tunes). All sums have a fixed order: repeated calls give identical bits.

Saved for the backward: the input, the hidden rows after the activation [R, I] and three vectors of integers.

Shapes: T tokens, D d_model, F d_ff, E experts, I = F/E neurons, K experts per token, R = T·K rows in expert order.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from switchable.compute.activations import RELU_TYPES
from switchable.compute.call import Backend, ExpertCall, compute_dtype, why_not_dtype
from switchable.compute.cuda.sort import Rows

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
"""Whether Triton's interpreter runs the kernels, on the CPU. Triton reads the variable when it is imported."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
"""torch's CUDA builds bring it, its CPU builds do not. Looked for once: torch.compile cannot trace the search."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _supports(call: ExpertCall) -> str | None:
    device = call.x_TD.device
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a CUDA device, and the input is on {device} (TRITON_INTERPRET=1 runs its kernels there, slowly)"
    if not HAS_TRITON:
        return "needs triton, which is not installed; pip install triton"
    if call.weights.gate_FD is not None:
        return "has no kernels for gated FFNs"
    if call.activation not in RELU_TYPES:
        return f"has kernels for {' and '.join(RELU_TYPES)}, not for {call.activation}"
    if call.ragged:
        return "has no kernels for tokens with different numbers of experts"
    if not call.expert_ids_TK.numel():
        return "needs at least one token"
    return why_not_dtype(call, DTYPES)


def _run(call: ExpertCall) -> Tensor:
    dtype, weights = compute_dtype(call), call.weights
    bias_F = None if weights.up_bias_F is None else weights.up_bias_F.to(dtype)
    x_TD, up_FD, down_FD = (t.to(dtype) for t in (call.x_TD, weights.up_FD, weights.down_FD))
    squared = call.activation == "relu2"
    y_TD: Tensor = _forward(x_TD, up_FD, down_FD, bias_F, call.expert_ids_TK, call.num_experts, squared)[0]
    return y_TD.to(call.x_TD.dtype)


TRITON = Backend("triton", _supports, _run)
"""FFNs that are not gated, with ReLU or its square, in 16 or 32 bits."""


@torch.library.custom_op("switchable::sparse_ffn", mutates_args=())
def _forward(
    x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, ids: Tensor, num_experts: int, squared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y_TD and what the backward needs: h_RI, order_R, position_R, ends_E."""
    from switchable.compute.cuda.triton import launch  # imports triton: only where `supports` has seen it

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        y_TD, h_RI, rows = launch.forward(x, up, down, bias, ids, num_experts, squared)
    return y_TD, h_RI, *rows


@_forward.register_fake
def _(x: Tensor, up: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, num_experts, _squared = rest[2:]
    h_RI = x.new_empty(ids.numel(), up.shape[0] // num_experts)
    order_R, position_R = (ids.new_empty(ids.numel(), dtype=torch.int32) for _ in range(2))
    return x.new_empty(x.shape), h_RI, order_R, position_R, order_R.new_empty(num_experts)


@torch.library.custom_op("switchable::sparse_ffn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    h: Tensor,
    rows: list[Tensor],
    squared: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of those of x, up, down and bias that are wanted, in this order."""
    from switchable.compute.cuda.triton import launch

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return launch.backward(grad, x, up, down, h, Rows(*rows), squared, wanted)


@_backward.register_fake
def _(_grad: Tensor, x: Tensor, up: Tensor, down: Tensor, *rest: Any) -> list[Tensor]:
    grads = (x.new_empty(x.shape), torch.empty_like(up), torch.empty_like(down), up.new_empty(up.shape[0]))
    return [grad for grad, want in zip(grads, rest[-1], strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, up, down, *_, ctx.squared = inputs
    ctx.save_for_backward(x, up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _apply_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, up, down, h, *rows = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])  # x, up, down, bias; the others have no gradient
    grads = iter(_backward(grad, x, up, down, h, rows, ctx.squared, wanted))
    return (*(next(grads) if want else None for want in wanted), None, None, None)


_forward.register_autograd(_apply_backward, setup_context=_setup_context)
