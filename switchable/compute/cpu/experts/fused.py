"""`fused`: training and prefill on the CPU without copying a token.

    h = act(x · entranceᵀ + b) [⊙ (x · factorᵀ + c)],      y_t = Σ_k (h · down)_e(t,k)

The entrance is `up`; in a gated FFN it is the gate, and the factor is `up`.

Tokens are sorted by expert once. All products of a training step (two forward, four backward; gated three and six)
find the tokens' rows through their indices and add up where the result lies (`kernels.py`), so that neither gathered
rows nor what is to be scattered ever exists; ReLU, its derivative and that of the product with the factor are part of
them. Between the two passes only what the projections gave lives (T·K·I numbers, K/E of the dense layer's; gated twice)
with the sorted indices. The weights are copied into the order of the loops, which costs 1/T of a product. The
same bits come out whatever the number of threads. Without gradients all is one call (`prefill.py`).

ReLU and squared ReLU. Rows that are no whole vectors are filled up with zeros. In half precision what comes in is
rounded to it, and so is h where bfloat16 is multiplied as such (`packing.multiplied`); sums over experts and tokens
stay float32. Under `torch.compile` it is one graph break.

Source: ScatterMoE (Tan et al., 2024) gathers and scatters within the product, on GPUs; these loops do so on CPUs.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token, P = T·K sorted pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from switchable.compute.call import Backend, ExpertCall, compute_dtype, why_not_dtype
from switchable.compute.cpu.decode.rows import NUMBERS
from switchable.compute.cpu.experts.library import Library, Pairs, library
from switchable.compute.cpu.experts.packing import suited
from switchable.compute.cpu.experts.prefill import Prefill
from switchable.compute.cpu.limits import (
    LANE_BYTES,
    check_ids,
    why_no_loops,
    why_not_in_memory,
    why_not_relu_on_cpu,
)
from switchable.compute.cpu.llvm import Machine, this_machine
from switchable.compute.cpu.topk import MOST_EXPERTS
from switchable.compute.eager import eager


def supports(call: ExpertCall) -> str | None:
    """Return None, or why there are no loops for a call."""
    return (
        why_not_relu_on_cpu(call)
        or why_not_dtype(call, tuple(LANE_BYTES))
        or why_no_loops(call.x_TD.shape[1] + _missing(call), compute_dtype(call))
    )


@eager
def _missing(call: ExpertCall) -> int:
    """Return how many numbers fill a row up to whole vectors of what is multiplied."""
    machine, dtype = this_machine(), compute_dtype(call)
    if machine is None:
        return 0
    terms = 2 if machine.pairs and dtype == torch.bfloat16 else 1
    return -call.x_TD.shape[1] % (terms * machine.vector_bytes // LANE_BYTES[dtype])


def _filled_up(call: ExpertCall, missing: int) -> ExpertCall:
    own, more = call.weights, (0, missing)
    gate_FD = None if own.gate_FD is None else pad(own.gate_FD, more)
    weights = replace(own, up_FD=pad(own.up_FD, more), down_FD=pad(own.down_FD, more), gate_FD=gate_FD)
    return call._replace(x_TD=pad(call.x_TD, more), weights=weights, rounded=None)


@eager
def run(call: ExpertCall) -> Tensor:
    """Return y_TD.

    Raises:
        InputError: an expert's number is not in 0..E-1.
    """
    if missing := _missing(call):
        return run(_filled_up(call, missing))[:, :-missing].contiguous()
    x_TD, weights, ids_TK, experts = call.x_TD, call.weights, call.expert_ids_TK, call.num_experts
    check_ids(ids_TK, experts + call.ragged)
    dtype = compute_dtype(call)
    machine = cast(Machine, this_machine())
    if not call.learns:
        return _without_gradients(call, dtype, library(x_TD.shape[1], call.neurons, dtype, machine))
    machine = suited(machine, call.neurons, ids_TK.numel() / experts)
    loops = library(x_TD.shape[1], call.neurons, dtype, machine)
    entrance, factor = weights.entrance_and_factor
    at_hand = None
    if call.rounded is not None:
        own = call.rounded.weights
        at_hand = (call.rounded.x_TD, own.down_FD, own.entrance_and_factor[0][0])
    plan = _Plan(loops, loops.sort(ids_TK, experts), call.activation == "relu2", dtype, at_hand)
    y_TD: Tensor = _Fused.apply(x_TD, weights.down_FD, *entrance, *factor, plan)  # type: ignore[no-untyped-call]
    return y_TD


@eager
def prepare_prefill(
    call: ExpertCall, router: tuple[Tensor, Tensor], start_D: Tensor | None, *, mass: float
) -> Prefill | None:
    """Return what computes calls like this one without gradients, with any tokens whose experts a router chooses.

    None where something would have to be copied first, or where there are no loops.

    Args:
        call: its weights must stay where they are.
        router: weight [E, D] and bias [E].
        start_D: what is added to every row: the bias of the output projection.
        mass: of `topk.py`.
    """
    x_TD, own, experts = call.x_TD, call.weights, call.num_experts
    if supports(call) is not None or _missing(call) or experts > MOST_EXPERTS:
        return None
    loops = library(x_TD.shape[1], call.neurons, x_TD.dtype, cast(Machine, this_machine()))
    if x_TD.dtype not in NUMBERS or any(each.dtype != loops.packing.dtype for each in (x_TD, *own.tensors)):
        return None
    if not all(each.is_contiguous() for each in own.tensors) or why_not_in_memory(*router):
        return None
    choice = (*router, call.expert_ids_TK.shape[1], mass)
    return Prefill(loops, own, experts, squared=call.activation == "relu2", start_D=start_D, router=choice)


def _without_gradients(call: ExpertCall, dtype: torch.dtype, loops: Library) -> Tensor:
    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(loops.packing.dtype).contiguous()

    own = {name: rounded(tensor) for name, tensor in vars(call.weights).items() if tensor is not None}
    weights = replace(call.weights, **own)
    prefill = Prefill(loops, weights, call.num_experts, squared=call.activation == "relu2")
    return prefill(rounded(call.x_TD), call.expert_ids_TK.contiguous()).to(call.x_TD.dtype)


FUSED = Backend("fused", supports, run)


class _Plan(NamedTuple):
    """What is not a differentiable tensor."""

    loops: Library
    pairs: Pairs
    squared: bool
    dtype: torch.dtype
    """That the call is computed in."""
    at_hand: tuple[Tensor, Tensor, Tensor] | None
    """x, down and the entrance rounded to it, if somebody has done so."""

    def rounded(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of the call, stored as the loops read it."""
        return tensor.to(self.dtype).to(self.loops.packing.dtype)

    def projected(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, *, relu: bool) -> Tensor:
        """A projection's results, or their ReLU."""
        bias = None if bias_F is None else self.rounded(bias_F).to(self.loops.sums).contiguous()
        return self.loops.project(x_TD, weight_FD, bias, self.pairs, relu=relu)

    def hidden(self, act_PI: Tensor, up_PI: Tensor | None) -> Tensor:
        """What `down` is multiplied with, from ReLU's results and the factor's; it stands until the next call."""
        for factor in ([act_PI] if self.squared else []) + ([] if up_PI is None else [up_PI]):
            scratch = self.loops.scratch("hidden", act_PI.shape, act_PI.dtype)
            act_PI = torch.mul(act_PI, factor, out=scratch)
        return act_PI


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        down_FD: Tensor,
        entrance_FD: Tensor,
        entrance_bias_F: Tensor | None,
        factor_FD: Tensor | None,
        factor_bias_F: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        x, down, entrance = plan.at_hand or (x_TD, down_FD, entrance_FD)
        x, down, entrance = plan.rounded(x).contiguous(), plan.rounded(down), plan.rounded(entrance)
        act_PI, factor, up_PI = plan.projected(x, entrance, entrance_bias_F, relu=True), None, None
        if factor_FD is not None:
            factor = plan.rounded(factor_FD)
            up_PI = plan.projected(x, factor, factor_bias_F, relu=False)
        y_TD = plan.loops.scatter(plan.hidden(act_PI, up_PI), down, plan.pairs, len(x))
        ctx.save_for_backward(x, down, entrance, factor, act_PI, up_PI)
        ctx.plan, ctx.weights = (
            plan._replace(at_hand=None),
            [w if w is None else w.dtype for w in (down_FD, entrance_FD, factor_FD)],
        )
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, down_FD, entrance_FD, factor_FD, act_PI, up_PI = ctx.saved_tensors
        plan: _Plan = ctx.plan
        loops, pairs = plan.loops, plan.pairs
        need_x, need_down, *need = ctx.needs_input_grad[:6]
        down, entrance, factor = ctx.weights

        def of_weight(values_PI: Tensor, rows_TD: Tensor, dtype: torch.dtype) -> Tensor:
            return loops.weight_gradient(values_PI, rows_TD, pairs).to(dtype)

        def of_projection(
            dz_PI: Tensor, dtype: torch.dtype, weight: bool, bias: bool
        ) -> tuple[Tensor | None, Tensor | None]:
            dweight = of_weight(dz_PI, x_TD, dtype) if weight else None
            return dweight, loops.bias_gradient(dz_PI, pairs) if bias else None

        dy_TD = plan.rounded(dy_TD).contiguous()
        dz_PI, dup_PI = loops.project_back(dy_TD, down_FD, act_PI, up_PI, pairs, squared=plan.squared)
        # What takes memory, sums of weights' gradients and a rounded copy of dy, is gone before the next ones are made.
        ddown_FD = of_weight(plan.hidden(act_PI, up_PI), dy_TD, down) if need_down else None
        del dy_TD
        dx_TD = loops.scatter(dz_PI, entrance_FD, pairs, len(x_TD)) if need_x else None
        if need_x and dup_PI is not None:
            loops.scatter(dup_PI, factor_FD, pairs, len(x_TD), onto_TD=dx_TD)
        return (  # autograd converts the others to the dtypes of the inputs
            dx_TD,
            ddown_FD,
            *of_projection(dz_PI, entrance, *need[:2]),
            *((None, None) if dup_PI is None else of_projection(dup_PI, factor, *need[2:])),
            None,
        )
