"""`fused`: training and prefill on the CPU without copying a token.

    h = relu(x · upᵀ + b),  y_t = Σ_k gate_tk · (h · down)_e(t,k);   d gate = Σ_i (dy · downᵀ)_i h_i

Tokens are sorted by expert once. All six products of a training step (two forward, four backward) find the tokens'
rows through their indices and add up where the result lies (`fused_kernels.py`), so that neither the gathered rows nor
what is to be scattered ever exists; ReLU and its derivative are part of the products. Between the two passes only h
lives (T·K·I numbers, K/E of the dense layer's) with the sorted indices. The weights are copied into the order of the
loops first, which costs 1/T of a product. The same bits come out whatever the number of threads.

ReLU and squared ReLU, with or without bias and gates, float32 and float64. For anything else (other activations, gated
FFNs, half precision, a d_model that is no multiple of a vector, other devices) `fused` hands over to `sorted`, and
under `torch.compile` it is one graph break.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, P = T·K sorted pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchable.compute.call import ExpertCall
from switchable.compute.cpu.experts.library import Library, Pairs, library
from switchable.compute.cpu.llvm import this_machine
from switchable.compute.cpu.pairs import check_ids
from switchable.compute.cpu.sorted import FAST_ACTIVATIONS, sorted_experts


def fused(call: ExpertCall) -> Tensor:
    """Return y_TD (see the module's text for what is fast)."""
    loops = _loops(call)
    if loops is None:
        return sorted_experts(call)
    y_TD: Tensor = _fused(call, loops)
    return y_TD


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _fused(call: ExpertCall, loops: Library) -> Tensor:
    ids_TK, experts, weights = call.expert_ids_TK, call.num_experts, call.weights
    check_ids(ids_TK, experts)
    plan = _Plan(loops, loops.sort(ids_TK, experts), experts, call.activation == "relu2", call.unit_gates)
    y_TD: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        call.x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F, call.gates_that_count, plan
    )
    return y_TD


def has_loops(d_model: int, neurons: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether `fused` has loops of its own for a shape."""
    return activation in FAST_ACTIVATIONS and library(d_model, neurons, dtype, this_machine()) is not None


def _loops(call: ExpertCall) -> Library | None:
    x_TD, weights = call.x_TD, call.weights
    tensors = (x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F)
    if (
        call.activation not in FAST_ACTIVATIONS
        or weights.gate_FD is not None
        or torch.is_autocast_enabled(x_TD.device.type)
        or any(t is not None and (t.device.type != "cpu" or t.dtype != x_TD.dtype) for t in tensors)
    ):
        return None
    return library(x_TD.shape[1], call.neurons, x_TD.dtype, this_machine())


class _Plan(NamedTuple):
    """What is not a differentiable tensor."""

    loops: Library
    pairs: Pairs
    num_experts: int
    squared: bool
    unit_gates: bool

    def hidden(self, act_PI: Tensor) -> Tensor:
        """The activations: ReLU's, or their squares, which stand until the next call."""
        return torch.mul(act_PI, act_PI, out=self.scratch("hidden", act_PI)) if self.squared else act_PI

    def gated(self, hidden_PI: Tensor, gates_P1: Tensor | None) -> Tensor:
        """The activations times their gates, which stand until the next call."""
        if gates_P1 is None:
            return hidden_PI
        return torch.mul(hidden_PI, gates_P1, out=self.scratch("hidden", hidden_PI))

    def times_derivative(self, dact_PI: Tensor, act_PI: Tensor) -> None:
        """Multiply by the activation function's derivative, in place."""
        if self.squared:
            dact_PI.mul_(act_PI).mul_(2)
        else:
            torch.ops.aten.threshold_backward.grad_input(dact_PI, act_PI, 0, grad_input=dact_PI)

    def scratch(self, name: str, like: Tensor) -> Tensor:
        return self.loops.scratch(name, like.shape, like.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        up_FD: Tensor,
        down_FD: Tensor,
        bias_F: Tensor | None,
        gates_TK: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        x_TD, loops, pairs = x_TD.contiguous(), plan.loops, plan.pairs
        bias_F = None if bias_F is None else bias_F.contiguous()
        gates_P1 = None
        if gates_TK is not None and not plan.unit_gates:
            gates_P1 = gates_TK.detach().reshape(-1, 1)[pairs.order_P].to(x_TD.dtype)
        act_PI = loops.dot(x_TD, up_FD, pairs, bias_F=bias_F, rectify=True)
        hidden_PI = plan.gated(plan.hidden(act_PI), gates_P1)
        y_TD = loops.scatter(hidden_PI, down_FD, pairs, len(x_TD))
        ctx.save_for_backward(x_TD, up_FD, down_FD, bias_F, gates_TK, gates_P1, act_PI)
        ctx.plan = plan
        return y_TD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_FD, down_FD, _, gates_TK, gates_P1, act_PI = ctx.saved_tensors
        plan: _Plan = ctx.plan
        loops, pairs, experts = plan.loops, plan.pairs, plan.num_experts
        need_x, need_up, need_down, need_bias, need_gates = ctx.needs_input_grad[:5]
        dy_TD = dy_TD.contiguous()
        # Gates, if there are any, come between the products and the derivative.
        by_act = not need_gates and gates_P1 is None
        dact_PI = loops.dot(
            dy_TD,
            down_FD,
            pairs,
            act_PI=act_PI if by_act else None,
            squared=plan.squared,
            out=plan.scratch("dact", act_PI),
        )
        hidden_PI, dgates_TK = plan.hidden(act_PI) if need_down or need_gates else act_PI, None
        if need_gates:
            dgates_TK = torch.empty_like(gates_TK, memory_format=torch.contiguous_format)
            dgates_TK.view(-1)[pairs.order_P] = (dact_PI * hidden_PI).sum(1).to(gates_TK.dtype)
        if gates_P1 is not None:
            dact_PI.mul_(gates_P1)
            hidden_PI = plan.gated(hidden_PI, gates_P1)
        if not by_act:
            plan.times_derivative(dact_PI, act_PI)
        return (
            loops.scatter(dact_PI, up_FD, pairs, len(x_TD)) if need_x else None,
            loops.weight_gradient(dact_PI, x_TD, pairs, experts) if need_up else None,
            loops.weight_gradient(hidden_PI, dy_TD, pairs, experts) if need_down else None,
            loops.bias_gradient(dact_PI, pairs, experts) if need_bias else None,
            dgates_TK,
            None,
        )
