"""What a layer learns besides the model's loss: its gradient joins the model's on the way back.

So a router learns in any training loop, without the loop having to collect its loss, and activations are penalised.
A loss counts `factor` times, by the value that this number has in the backward pass (`loss_scale.py`). Of the losses
that every dense step has, nothing but the gradient is ever computed: as graphs of a dozen small operations they took
more than the products of a small FFN.

Shapes: T tokens, E experts, F d_ff.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from switchable.compute.eager import eager
from switchable.ffn.router import mass_share


@eager  # compiled, `factor` is read too early
def attach_loss(y: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
    """Pass `y` through unchanged and add `loss` to whatever is minimised downstream."""
    attached: Tensor = _AttachLoss.apply(y, loss, factor)  # type: ignore[no-untyped-call]
    return attached


@eager
def teach(y: Tensor, scores_TE: Tensor, mass_TE: Tensor, factor: Tensor) -> Tensor:
    """Do what attaching `router_loss(scores, mass)` to `y` does."""
    taught: Tensor = _Teach.apply(y, scores_TE, mass_TE, factor)  # type: ignore[no-untyped-call]
    return taught


@eager
def penalise(hidden: Tensor, l1: float, factor: Tensor) -> Tensor:
    """Pass activations [..., F] through; l1 · the mean over tokens of Σ |a_i| is minimised besides."""
    rows = max(1, hidden.shape[:-1].numel())
    penalised: Tensor = _Penalise.apply(hidden, l1 / rows, factor)  # type: ignore[no-untyped-call]
    return penalised


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, factor: Tensor) -> Tensor:  # noqa: ARG004 - what has a gradient
        ctx.save_for_backward(factor)
        return y.detach()  # y itself, not a view of it: Falcon adds to its FFN's output in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0], factor, None


class _Teach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scores_TE: Tensor, mass_TE: Tensor, factor: Tensor) -> Tensor:
        share_TE = mass_share(mass_TE).to(scores_TE.dtype)
        # A silent token's shares add up to 0, all others' to 1.
        slope_TE = scores_TE.softmax(dim=-1).mul_(share_TE.sum(dim=-1, keepdim=True)).sub_(share_TE)
        ctx.save_for_backward(slope_TE.div_(max(1, len(slope_TE))), factor)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        slope_TE, factor = ctx.saved_tensors
        return grads[0], slope_TE * factor, None, None


class _Penalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, l1: float, factor: Tensor) -> Tensor:
        ctx.l1 = l1
        ctx.save_for_backward(hidden, factor)
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        hidden, factor = ctx.saved_tensors
        slope, sign = (factor * ctx.l1).to(hidden.dtype), hidden.sign()
        memory = None if torch.is_grad_enabled() else sign
        return torch.addcmul(grads[0], sign, slope, out=memory), None, None
