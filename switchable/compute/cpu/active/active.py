"""`active`: a dense layer's training step that multiplies only what ReLU lets through.

    h = relu(x · upᵀ + b)      in full: only that tells which neurons are active
    y = h · down               over the active entries of h, and so are
    dh = dy · downᵀ,   dx = dh · up,   d up = dhᵀ · x,   d down = hᵀ · dy

Where h is zero, so are its derivative and whatever it is multiplied with: leaving that out changes nothing but the
order in which numbers are added up. So this *is* dense training, at 1/6 of the FFN's FLOPs and 5/6 of the share of
neurons that are active, which is a few per cent from early on. No neuron has to be grouped and no router asked. Between
the two passes only the active entries are kept.

ReLU and squared ReLU, float32 and float64, on the CPU. The same bits come out whatever the number of threads.

Source of the idea: the gradient's sparsity is ReLU's own; TwELL (ICML 2026) uses it on GPUs. The loops are ours.

Shapes: T tokens, D d_model, F d_ff, A active entries, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchable.compute.call import RELU_TYPES, FFNWeights
from switchable.compute.cpu.active.library import ActiveLibrary, active_library
from switchable.compute.cpu.limits import why_no_loops
from switchable.compute.cpu.llvm import Machine, this_machine


class ActiveOutput(NamedTuple):
    """What `active` returns."""

    y_TD: Tensor
    """Without the bias of the output projection."""
    mass_TE: Tensor | None
    """The activation mass of each expert, no part of the graph; None if it was not asked for."""
    entries: int
    """A, how many activations were not zero."""


def has_active(x_TD: Tensor, weights: FFNWeights, activation: str) -> bool:
    """Whether there are loops for an FFN and its input."""
    d_model, dtype, device = x_TD.shape[-1], x_TD.dtype, x_TD.device.type
    return (
        not torch.is_autocast_enabled(device)
        and all(t.device.type == device and t.dtype == dtype for t in weights.tensors)
        and skips_idle_neurons(d_model, activation, weights.gate_FD is not None, dtype, device)
    )


def skips_idle_neurons(d_model: int, activation: str, gated: bool, dtype: torch.dtype, device: str) -> bool:
    """Return whether dense steps of a model can multiply active neurons only; nothing is compiled for the answer.

    Args:
        d_model: its width.
        activation: of its FFNs.
        gated: whether these have a gate.
        dtype: of the multiplications.
        device: `"cpu"` or another type of device.
    """
    return device == "cpu" and not gated and activation in RELU_TYPES and why_no_loops(d_model, dtype) is None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def active(
    x_TD: Tensor,
    weights: FFNWeights,
    activation: str,
    num_experts: int | None = None,
    penalty: Callable[[], float] | None = None,
) -> ActiveOutput:
    """Return act(x · upᵀ + b) · down; `has_active` must hold.

    Args:
        x_TD: tokens.
        weights: the FFN's.
        activation: `"relu"` or `"relu2"`.
        num_experts: of how many groups of neighbouring neurons the mass is wanted, if it is.
        penalty: says in the backward pass what the derivative of a loss by every activation that is not zero is,
            besides what comes from the output.
    """
    loops = active_library(x_TD.shape[-1], x_TD.dtype, cast(Machine, this_machine()))
    plan = _Plan(loops, activation == "relu2", num_experts, penalty, [])
    y_TD, mass_TE = _Active.apply(  # type: ignore[no-untyped-call]
        x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F, plan
    )
    return ActiveOutput(y_TD, mass_TE if num_experts else None, plan.counted[0])


class _Plan(NamedTuple):
    """What is not a differentiable tensor; `counted` receives the number of entries."""

    loops: ActiveLibrary
    squared: bool
    num_experts: int | None
    penalty: Callable[[], float] | None
    counted: list[int]


class _Active(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, bias_F: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        x_TD, down_FD, loops = x_TD.contiguous(), down_FD.contiguous(), plan.loops
        entries = loops.collect(x_TD, up_FD, bias_F)
        plan.counted.append(len(entries.values))
        hidden_A = entries.values.square() if plan.squared else entries.values
        y_TD = loops.sum(entries, hidden_A, down_FD)
        mass_TE = (
            loops.mass(entries, hidden_A, down_FD.norm(dim=1), plan.num_experts)
            if plan.num_experts
            else x_TD.new_empty(0)
        )
        ctx.save_for_backward(x_TD, up_FD, down_FD)
        ctx.plan, ctx.entries = plan, entries
        ctx.mark_non_differentiable(mass_TE)
        return y_TD, mass_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_FD, down_FD = ctx.saved_tensors
        plan: _Plan = ctx.plan
        loops, entries = plan.loops, ctx.entries
        need_x, need_up, need_down, need_bias = ctx.needs_input_grad[:4]
        dy_TD = dy_TD.contiguous()
        dact_A, hidden_A = loops.dot(entries, dy_TD, down_FD), entries.values
        if plan.penalty:
            dact_A.add_(plan.penalty())
        if plan.squared:
            dact_A.mul_(entries.values).mul_(2)
            hidden_A = entries.values.square()
        by_neuron = loops.by_neuron(entries)
        return (
            loops.sum(entries, dact_A, up_FD.contiguous()) if need_x else None,
            loops.weight_gradient(by_neuron, dact_A, x_TD) if need_up else None,
            loops.weight_gradient(by_neuron, hidden_A, dy_TD) if need_down else None,
            loops.bias_gradient(by_neuron, dact_A) if need_bias else None,
            None,
        )
