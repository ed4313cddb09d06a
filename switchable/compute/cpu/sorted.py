"""`sorted`: training and prefill on the CPU, one autograd function over tokens sorted by expert.

    h = act(x · upᵀ + b),      y_t = Σ_k (h · down)_e(t,k)

The gain of sparsity is eaten by traffic, not by arithmetic, when every token is copied K times. So tokens are
sorted by expert once, and each expert's rows are gathered into one small buffer that all experts reuse (it stays
in the cache), multiplied with `out=`, and added to the result. The backward gathers again instead of saving
copies: only h (T·K·I numbers, K/E of the dense layer's) and the sorted indices live between the two passes.
Weight gradients are written straight into slices of tensors that have the parameters' own memory layout.

An expert's rows are cut into as many equal *lanes* as there are threads (`pairs.py`), and products are batched over
the lanes: every core then multiplies the rows that it gathered itself, which lie in its own cache (on 2 cores:
products 5 % faster, the gradient of `up` 25 %).

ReLU and squared ReLU, any precision; sums over experts are kept in float32 for half precision. Under `torch.compile`
the function is one graph break.

Source: the sort by expert and the grouped products of MegaBlocks (Gale et al., 2022), with one buffer in the cache.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, P sorted pairs
(the T·K pairs and the padding), L lanes, R rows of one chunk, N = R/L rows of a lane.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchable.compute.call import Backend, ExpertCall, autocasts, compute_dtype
from switchable.compute.cpu.limits import why_not_relu_on_cpu
from switchable.compute.cpu.pairs import Chunk, SortedPairs
from switchable.compute.eager import eager


@eager
def run(call: ExpertCall) -> Tensor:
    """Return y_TD."""
    x, weights = call.x_TD, call.weights
    up_FD, down_FD, bias_F = weights.up_FD, weights.down_FD, weights.up_bias_F
    if autocasts(call):
        dtype = compute_dtype(call)
        x, up_FD, down_FD = x.to(dtype), up_FD.to(dtype), down_FD.to(dtype)
        bias_F = None if bias_F is None else bias_F.to(dtype)
    with torch.autocast("cpu", enabled=False):
        pairs = SortedPairs.sort(call.expert_ids_TK, call.num_experts)
        plan = _Plan(pairs, call.num_experts, call.activation == "relu2")
        y_TD: Tensor = _SortedExperts.apply(x, up_FD, down_FD, bias_F, plan)  # type: ignore[no-untyped-call]
    return y_TD.to(call.x_TD.dtype)


def supports(call: ExpertCall) -> str | None:
    """Return None, or why it is none of its calls."""
    gated = call.weights.gate_FD is not None
    return "does not compute gated FFNs" if gated else why_not_relu_on_cpu(call)


SORTED = Backend("sorted", supports, run)


class _Plan(NamedTuple):
    """What is not a differentiable tensor."""

    pairs: SortedPairs
    num_experts: int
    squared: bool

    def by_expert(self, matrix_FX: Tensor) -> Tensor:
        """A view [E, L, I, X] of a matrix's slices, the same for all lanes."""
        slices = matrix_FX.view(self.num_experts, 1, -1, matrix_FX.shape[1])
        return slices.expand(-1, self.pairs.lanes, -1, -1)


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, bias_F: Tensor | None, plan: _Plan
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        act_PI = x_TD.new_empty(len(plan.pairs.tokens_P), up_FD.shape[0] // plan.num_experts)
        y_TD = _forward(x_TD, up_FD, down_FD, bias_F, act_PI, plan)
        ctx.save_for_backward(x_TD, up_FD, down_FD, bias_F, act_PI)
        ctx.plan = plan
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return (*_backward(ctx, dy_TD.contiguous()), None)


def _forward(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, bias_F: Tensor | None, act_PI: Tensor, plan: _Plan
) -> Tensor:
    """Return y_TD and fill act_PI with the rectified projections."""
    pairs = plan.pairs
    x_buffer, hidden_buffer = _buffer(pairs, x_TD), _buffer(pairs, act_PI)
    y_TD = _zeros_for_sums(x_TD)
    up_ELDI, down_ELID = plan.by_expert(up_FD).mT, plan.by_expert(down_FD)
    bias_EL1I = None if bias_F is None else plan.by_expert(bias_F.unsqueeze(1)).mT
    for chunk, tokens, act in zip(
        pairs.chunks, pairs.parts(pairs.tokens_P), pairs.parts(act_PI), strict=True
    ):
        e, rows = chunk.expert, len(tokens)
        x = torch.index_select(x_TD, 0, tokens, out=x_buffer[:rows])
        x_LND, act_LNI = pairs.by_lane(x), pairs.by_lane(act)
        if bias_EL1I is None:
            torch.bmm(x_LND, up_ELDI[e], out=act_LNI)
        else:
            torch.baddbmm(bias_EL1I[e], x_LND, up_ELDI[e], out=act_LNI)
        act.relu_()
        if rows > chunk.tokens:
            act[chunk.tokens :] = 0  # the padding must add nothing
        hidden = torch.mul(act, act, out=hidden_buffer[:rows]) if plan.squared else act
        torch.bmm(pairs.by_lane(hidden), down_ELID[e], out=x_LND)
        y_TD.index_add_(0, tokens, x.to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def _backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, up, down and bias, those that are needed."""
    x_TD, up_FD, down_FD, bias_F, act_PI = ctx.saved_tensors
    plan: _Plan = ctx.plan
    pairs = plan.pairs
    need_x, need_up, need_down, need_bias = ctx.needs_input_grad[:4]
    in_buffer, out_buffer = _buffer(pairs, x_TD), _buffer(pairs, x_TD)
    dact_buffer, hidden_buffer = _buffer(pairs, act_PI), _buffer(pairs, act_PI)
    dx_TD = _zeros_for_sums(x_TD) if need_x else None
    dup = _WeightGradient(up_FD, plan) if need_up else None
    ddown = _WeightGradient(down_FD, plan) if need_down else None
    dbias_F = torch.zeros_like(bias_F) if need_bias else None
    up_ELID, down_ELDI = plan.by_expert(up_FD), plan.by_expert(down_FD).mT
    for chunk, tokens, act in zip(
        pairs.chunks, pairs.parts(pairs.tokens_P), pairs.parts(act_PI), strict=True
    ):
        e, rows = chunk.expert, len(tokens)
        dy = torch.index_select(dy_TD, 0, tokens, out=out_buffer[:rows])
        dact = dact_buffer[:rows]
        dact_LNI = pairs.by_lane(dact)
        torch.bmm(pairs.by_lane(dy), down_ELDI[e], out=dact_LNI)
        if ddown is not None:
            hidden = torch.mul(act, act, out=hidden_buffer[:rows]) if plan.squared else act
            ddown.add(chunk, hidden, dy)
        if plan.squared:
            dact.mul_(act).mul_(2)
        else:
            torch.ops.aten.threshold_backward.grad_input(dact, act, 0, grad_input=dact)
        if dbias_F is not None:
            dbias_F.view(plan.num_experts, -1)[e].add_(dact.sum(0))
        if dup is not None:
            dup.add(chunk, dact, torch.index_select(x_TD, 0, tokens, out=in_buffer[:rows]))
        if dx_TD is not None:
            torch.bmm(dact_LNI, up_ELID[e], out=pairs.by_lane(dy))
            dx_TD.index_add_(0, tokens, dy.to(dx_TD.dtype))
    return (
        None if dx_TD is None else dx_TD.to(x_TD.dtype),
        None if dup is None else dup.gradient,
        None if ddown is None else ddown.gradient,
        dbias_F,
    )


class _WeightGradient:
    """Gradient of a matrix that holds I rows for each expert, in the memory layout of that matrix."""

    def __init__(self, weight_FX: Tensor, plan: _Plan):
        self.gradient = torch.empty_like(weight_FX)
        self.pairs = plan.pairs
        self.slices = self.gradient.view(plan.num_experts, -1, weight_FX.shape[1]).unbind(0)
        for expert in plan.pairs.unused:
            self.slices[expert].zero_()
        # Sums of lanes are worth their addition where the result is stored row by row (`ffn/layout.py`); not where it
        # would have to be transposed.
        row_wise = weight_FX.stride(1) == 1
        self.partial = (
            weight_FX.new_empty(plan.pairs.lanes, *self.slices[0].shape)
            if row_wise and plan.pairs.lanes > 1
            else None
        )

    def add(self, chunk: Chunk, left_RI: Tensor, right_RX: Tensor) -> None:
        """Add leftᵀ · right to the slice of the chunk's expert."""
        own = self.slices[chunk.expert]
        if self.partial is None:
            torch.addmm(own, left_RI.t(), right_RX, beta=0 if chunk.first else 1, out=own)
            return
        torch.bmm(self.pairs.by_lane(left_RI).mT, self.pairs.by_lane(right_RX), out=self.partial)
        if not chunk.first:
            self.partial[0].add_(own)
        if self.pairs.lanes == 2:
            torch.add(self.partial[0], self.partial[1], out=own)
        else:
            torch.sum(self.partial, 0, out=own)


def _buffer(pairs: SortedPairs, like_TX: Tensor) -> Tensor:
    return like_TX.new_empty(pairs.most_rows, like_TX.shape[1])


def _zeros_for_sums(like_TD: Tensor) -> Tensor:
    """Sums over experts are kept in float32 for the half precisions."""
    return torch.zeros_like(like_TD, dtype=torch.promote_types(like_TD.dtype, torch.float32))
