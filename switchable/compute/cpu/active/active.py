"""`active`: a dense layer's training step that multiplies only what ReLU lets through.

    h = relu(x · upᵀ + b)      in full: only that tells which neurons are active
    y = h · down               over the active entries of h, and so are
    dh = dy · downᵀ,   dx = dh · up,   d up = dhᵀ · x,   d down = hᵀ · dy

With a gate, relu(x · gateᵀ + b) is what is computed in full, and x · upᵀ for its active entries.

Where h is zero, so are its derivative and whatever it is multiplied with: leaving that out changes nothing but the
order in which numbers are added up. So this *is* dense training, at 1/6 of the FFN's FLOPs and 5/6 of the share of
neurons that are active, which is a few per cent from early on. No neuron has to be grouped and no router asked. Between
the two passes only the active entries are kept.

ReLU and squared ReLU, on the CPU, in float32, float64, and in bfloat16 where the processor multiplies pairs of it. Then
weights, x, dy and the full product are rounded to bfloat16 as in a dense layer, and nothing else is but what comes out.
The same bits come out whatever the number of threads.

Source of the idea: the gradient's sparsity is ReLU's own; TwELL (ICML 2026) uses it on GPUs. The loops are ours.

Shapes: T tokens, D d_model, F d_ff, A active entries, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchable.compute.activations import RELU_TYPES
from switchable.compute.call import ExpertCall, FFNWeights, compute_dtype, why_not_dtype
from switchable.compute.cpu.active.library import ActiveLibrary, active_library
from switchable.compute.cpu.experts.packing import multiplied
from switchable.compute.cpu.limits import LANE_BYTES, why_no_loops, why_not_in_memory
from switchable.compute.cpu.llvm import Machine, this_machine
from switchable.compute.eager import eager
from switchable.ranks import is_sharded

MOST_ACTIVE = {torch.bfloat16: 0.2}
"""Share of active neurons from which dense products are as fast, where their library is so much faster: the break-even
was at 21, 23 and 30 % with D = 256, 512 and 768. Others leave it to the settings."""


class ActiveOutput(NamedTuple):
    """What `active` returns."""

    y_TD: Tensor
    """Without the bias of the output projection."""
    mass_TE: Tensor | None
    """The activation mass of each expert, no part of the graph; None if it was not asked for."""
    entries: int
    """A, how many activations were not zero."""


def has_active(x_TD: Tensor, weights: FFNWeights, activation: str, share: float = 0.0) -> bool:
    """Whether there are loops for an FFN and its input, and they pay with such a share of active neurons."""
    call = _call(x_TD, weights, activation)
    dtype, device = compute_dtype(call), x_TD.device.type
    return (
        why_not_dtype(call, (dtype,)) is None
        and all(t.device.type == device for t in weights.tensors)
        # Asked between forward passes, where ranks hold parts of weights that are whole in them.
        and why_not_in_memory(*(t for t in weights.tensors if not is_sharded(t))) is None
        and skips_idle_neurons(x_TD.shape[-1], activation, dtype, device, share)
    )


def skips_idle_neurons(
    d_model: int, activation: str, dtype: torch.dtype, device: str, share: float = 0.0
) -> bool:
    """Return whether dense steps of a model can multiply active neurons only; nothing is compiled for the answer.

    Args:
        d_model: its width.
        activation: of its FFNs.
        dtype: of the multiplications.
        device: `"cpu"` or another type of device.
        share: of the neurons, active on a token.
    """
    own = device == "cpu" and activation in RELU_TYPES and dtype in LANE_BYTES
    # Half precision that would be multiplied in float32 is slower than dense.
    as_it_is = own and multiplied(d_model, 2, dtype, this_machine()) == dtype
    return as_it_is and share < MOST_ACTIVE.get(dtype, 1.0) and why_no_loops(d_model, dtype) is None


@eager
def active(
    x_TD: Tensor,
    weights: FFNWeights,
    activation: str,
    num_experts: int | None = None,
    penalty: Callable[[], float] | None = None,
) -> ActiveOutput:
    """Return act(x · upᵀ + b) · down, or what it is with a gate; `has_active` must hold.

    Args:
        x_TD: tokens.
        weights: the FFN's.
        activation: `"relu"` or `"relu2"`.
        num_experts: of how many groups of neighbouring neurons the mass is wanted, if it is.
        penalty: says in the backward pass what the derivative of a loss by the amount of every activation that is not
            zero is, besides what comes from the output.
    """
    dtype = compute_dtype(_call(x_TD, weights, activation))
    loops = active_library(x_TD.shape[-1], dtype, cast(Machine, this_machine()))
    plan = _Plan(loops, dtype, activation == "relu2", num_experts, penalty, [])
    own = (weights.up_FD, weights.down_FD, weights.up_bias_F, weights.gate_FD, weights.gate_bias_F)
    y_TD, mass_TE = _Active.apply(x_TD, *own, plan)  # type: ignore[no-untyped-call]
    return ActiveOutput(y_TD, mass_TE if num_experts else None, plan.counted[0])


def _call(x_TD: Tensor, weights: FFNWeights, activation: str) -> ExpertCall:
    """The dense layer as a call of one expert, for what is asked of calls."""
    return ExpertCall(x_TD, weights, torch.empty(0, 1, dtype=torch.int64), 1, activation)


class _Plan(NamedTuple):
    """What is not a differentiable tensor; `counted` receives the number of entries."""

    loops: ActiveLibrary
    dtype: torch.dtype
    """That is multiplied."""
    squared: bool
    num_experts: int | None
    penalty: Callable[[], float] | None
    counted: list[int]

    def rounded(self, *tensors: Tensor | None) -> list[Any]:
        """Tensors as the loops read them."""
        return [None if tensor is None else tensor.to(self.dtype) for tensor in tensors]

    def act(self, values_A: Tensor) -> Tensor:
        """The activations of what ReLU lets through."""
        return values_A.square() if self.squared else values_A


class _Active(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        up_FD: Tensor,
        down_FD: Tensor,
        bias_F: Tensor | None,
        gate_FD: Tensor | None,
        gate_bias_F: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        x, up, down, bias, gate, gate_bias = plan.rounded(x_TD, up_FD, down_FD, bias_F, gate_FD, gate_bias_F)
        x, down, loops = x.contiguous(), down.contiguous(), plan.loops
        entries = loops.collect(x, up, bias) if gate is None else loops.collect(x, gate, gate_bias)
        plan.counted.append(len(entries.values))
        hidden_A, factor_A = plan.act(entries.values), None
        if gate is not None:
            up = up.contiguous()
            factor_A = loops.dot(entries, x, up)
            if bias is not None:
                factor_A += bias[entries.neurons]
            hidden_A = hidden_A * factor_A
        y_TD = loops.sum(entries, hidden_A, down)
        mass_TE = y_TD.new_empty(0)
        if plan.num_experts:
            amounts_A = hidden_A if gate is None else hidden_A.abs()
            norms_F = torch.linalg.vector_norm(down, dim=1, dtype=loops.sums)
            mass_TE = loops.mass(entries, amounts_A, norms_F, plan.num_experts)
        ctx.save_for_backward(x, up, down, gate, factor_A)
        ctx.plan, ctx.entries = plan, entries
        ctx.mark_non_differentiable(mass_TE)
        return y_TD.to(x_TD.dtype), mass_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, gate, factor_A = ctx.saved_tensors
        plan: _Plan = ctx.plan
        loops, entries, gated = plan.loops, ctx.entries, gate is not None
        need = ctx.needs_input_grad
        dy = plan.rounded(dy_TD)[0].contiguous()
        act_A, dact_A = plan.act(entries.values), loops.dot(entries, dy, down)
        if plan.penalty:
            dact_A.add_(plan.penalty() * (factor_A.sign() if gated else 1))
        hidden_A, dup_A = act_A, dact_A
        if gated:
            hidden_A, dup_A = act_A * factor_A, dact_A * act_A
            dact_A.mul_(factor_A)
        if plan.squared:
            dact_A.mul_(entries.values).mul_(2)
        by_neuron = loops.by_neuron(entries)

        def gradients(values_A: Tensor, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
            return (
                loops.weight_gradient(by_neuron, values_A, x) if weight else None,
                loops.bias_gradient(by_neuron, values_A) if bias else None,
            )

        dx = None
        if need[0]:
            dx = loops.sum(entries, dup_A, up.contiguous())
            if gated:
                dx += loops.sum(entries, dact_A, gate.contiguous())
        d_up, d_bias = gradients(dup_A, need[1], need[3])
        d_gate, d_gate_bias = gradients(dact_A, need[4], need[5]) if gated else (None, None)
        d_down = loops.weight_gradient(by_neuron, hidden_A, dy) if need[2] else None
        return dx, d_up, d_down, d_bias, d_gate, d_gate_bias, None
