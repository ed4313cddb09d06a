"""`fused`: training and prefill on the CPU without copying a token.

    h = act(x · upᵀ + b),      y_t = Σ_k (h · down)_e(t,k)

Tokens are sorted by expert once. All six products of a training step (two forward, four backward) find the tokens'
rows through their indices and add up where the result lies (`kernels.py`), so that neither gathered rows nor what is
to be scattered ever exists; ReLU and its derivative are part of the products. Between the two passes only h lives
(T·K·I numbers, K/E of the dense layer's) with the sorted indices. The weights are copied into the order of the loops
first, which costs 1/T of a product. The same bits come out whatever the number of threads.

ReLU and squared ReLU, float32 and float64. Under `torch.compile` it is one graph break.

Source: ScatterMoE (Tan et al., 2024) gathers and scatters within the product, on GPUs; these loops do so on CPUs.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, P = T·K sorted pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchable.compute.call import Backend, ExpertCall
from switchable.compute.cpu.experts.library import Library, Pairs, library
from switchable.compute.cpu.limits import check_ids, why_no_loops, why_not_relu_on_cpu
from switchable.compute.cpu.llvm import Machine, this_machine


def supports(call: ExpertCall) -> str | None:
    """Return None, or why there are no loops for a call."""
    x_TD = call.x_TD
    if torch.is_autocast_enabled("cpu"):
        return "does not compute under autocast"
    if any(tensor.dtype != x_TD.dtype for tensor in call.weights.tensors):
        return "needs input and weights of one dtype"
    return why_not_relu_on_cpu(call) or why_no_loops(x_TD.shape[1], x_TD.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run(call: ExpertCall) -> Tensor:
    """Return y_TD.

    Raises:
        InputError: an expert's number is not in 0..E-1.
    """
    x_TD, weights, ids_TK, experts = call.x_TD, call.weights, call.expert_ids_TK, call.num_experts
    check_ids(ids_TK, experts)
    loops = library(x_TD.shape[1], call.neurons, x_TD.dtype, cast(Machine, this_machine()))
    plan = _Plan(loops, loops.sort(ids_TK, experts), experts, call.activation == "relu2")
    y_TD: Tensor = _Fused.apply(x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F, plan)  # type: ignore[no-untyped-call]
    return y_TD


FUSED = Backend("fused", supports, run)


class _Plan(NamedTuple):
    """What is not a differentiable tensor."""

    loops: Library
    pairs: Pairs
    num_experts: int
    squared: bool

    def hidden(self, act_PI: Tensor) -> Tensor:
        """The activations: ReLU's, or their squares, which stand until the next call."""
        return torch.mul(act_PI, act_PI, out=self.scratch("hidden", act_PI)) if self.squared else act_PI

    def scratch(self, name: str, like: Tensor) -> Tensor:
        return self.loops.scratch(name, like.shape, like.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, bias_F: Tensor | None, plan: _Plan
    ) -> Tensor:
        x_TD, loops, pairs = x_TD.contiguous(), plan.loops, plan.pairs
        bias_F = None if bias_F is None else bias_F.contiguous()
        act_PI = loops.dot(x_TD, up_FD, pairs, bias_F=bias_F)
        y_TD = loops.scatter(plan.hidden(act_PI), down_FD, pairs, len(x_TD))
        ctx.save_for_backward(x_TD, up_FD, down_FD, act_PI)
        ctx.plan = plan
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, up_FD, down_FD, act_PI = ctx.saved_tensors
        plan: _Plan = ctx.plan
        loops, pairs, experts = plan.loops, plan.pairs, plan.num_experts
        need_x, need_up, need_down, need_bias = ctx.needs_input_grad[:4]
        dy_TD = dy_TD.contiguous()
        out = plan.scratch("dact", act_PI)
        dact_PI = loops.dot(dy_TD, down_FD, pairs, act_PI=act_PI, squared=plan.squared, out=out)
        return (
            loops.scatter(dact_PI, up_FD, pairs, len(x_TD)) if need_x else None,
            loops.weight_gradient(dact_PI, x_TD, pairs, experts) if need_up else None,
            loops.weight_gradient(plan.hidden(act_PI), dy_TD, pairs, experts) if need_down else None,
            loops.bias_gradient(dact_PI, pairs, experts) if need_bias else None,
            None,
        )
