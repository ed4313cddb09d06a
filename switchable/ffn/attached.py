"""What a layer learns besides the model's loss: its gradient joins the model's on the way back.

So a router learns in any training loop, without the loop having to collect its loss, and activations are penalised.
Nothing but the gradient is computed of what every dense step learns: as graphs of a dozen small operations these losses
took more than the products of a small FFN.

Such a loss is treated as the model's own, whatever the loop makes of that:

    loop     (factor · model(**batch).loss).backward()          1 / micro-batches, a GradScaler's scale, ...
    layer    gradient of an attached loss = factor · its own

A layer does not see the model's loss. But the first thing that a backward pass computes is that loss's gradient, which
is the factor. A hook on the loss notes it, and the layers, whose turn comes later, read it.

Shapes: T tokens, E experts, F d_ff.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from switchable.compute.eager import eager
from switchable.ffn.router import mass_share


class LossScale:
    """The factor of a model's loss, shared by its layers."""

    def __init__(self) -> None:
        self.unseen = 1.0
        """The factor where the loss is computed outside the model, which cannot be seen: for the loop to set."""
        self.routers = 1 / 32
        """What reaches the routers of their loss's gradient: little, so that it does not count where a loop clips by
        the norm of all. Adam's steps are as large as ever, SGD's are not."""
        self.passes = {True: 0, False: 0}
        """Forward passes with gradients, in training mode and in evaluation mode."""
        self.outside = 0
        """Those in training mode that returned no loss."""
        self.now = torch.ones(())
        """Of the forward pass under way. Backward passes hold on to it, and it gets its value under their hands."""

    def watch(self, model: nn.Module) -> None:
        """Note the factor of this model's loss from now on."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, with_kwargs=True)

    def _begin(self, model: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():
            weight = next(model.parameters())
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.now = torch.full((), self.unseen, dtype=dtype, device=weight.device)

    @eager
    def _end(self, model: nn.Module, _args: Any, inputs: Mapping[str, Any], output: Any) -> None:
        loss, now, share = _loss_in(output), self.now, _share(inputs)
        learns = torch.is_grad_enabled()
        self.passes[model.training] += learns
        self.outside += loss is None and model.training and learns

        def note(gradient: Tensor) -> None:
            # Through `data`: autograd would refuse what was saved for a backward pass and has changed since.
            now.data.copy_(gradient * share)

        if loss is not None:
            loss.register_hook(note)  # type: ignore[no-untyped-call]


def _loss_in(output: Any) -> Tensor | None:
    """Return the loss in what a model returns: the first number with a gradient; None if there is none."""
    several = output.values() if isinstance(output, Mapping) else output
    parts = several if isinstance(output, Mapping | tuple) else [output]
    numbers = (part for part in parts if isinstance(part, Tensor) and part.ndim == 0)
    return next((number for number in numbers if number.requires_grad), None)


def _share(inputs: Mapping[str, Any]) -> Any:
    """Return the factor in a loss that the model itself divides among micro-batches, as transformers' Trainer asks."""
    items = inputs.get("num_items_in_batch")
    return 1.0 if items is None or "labels" not in inputs else inputs["labels"].ne(-100).sum() / items


@eager  # compiled, `factor` is read too early
def attach_loss(y: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
    """Pass `y` through unchanged and add `loss` to whatever is minimised downstream."""
    attached: Tensor = _Attach.apply(y, loss, torch.ones_like(loss), factor)  # type: ignore[no-untyped-call]
    return attached


@eager
def teach(y: Tensor, scores_TE: Tensor, mass_TE: Tensor, factor: Tensor, part: float) -> Tensor:
    """Do what attaching `part · router_loss(scores, mass)` to `y` does."""
    with torch.no_grad():
        share_TE = mass_share(mass_TE).to(scores_TE.dtype)
        # A silent token's shares add up to 0, all others' to 1.
        slope_TE = scores_TE.softmax(dim=-1).mul_(share_TE.sum(dim=-1, keepdim=True)).sub_(share_TE)
        slope_TE.div_(max(1, len(slope_TE)) / part)
    taught: Tensor = _Attach.apply(y, scores_TE, slope_TE, factor)  # type: ignore[no-untyped-call]
    return taught


@eager
def penalise(hidden: Tensor, l1: float, factor: Tensor) -> Tensor:
    """Pass activations [..., F] through; l1 · the mean over tokens of Σ |a_i| is minimised besides."""
    rows = max(1, hidden.shape[:-1].numel())
    penalised: Tensor = _Penalise.apply(hidden, l1 / rows, factor)  # type: ignore[no-untyped-call]
    return penalised


class _Attach(torch.autograd.Function):
    """Passes y through; the gradient of x is factor · slope."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, _x: Tensor, slope: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(slope, factor)
        return y.detach()  # y itself, not a view of it: Falcon adds to its FFN's output in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        slope, factor = ctx.saved_tensors
        return grads[0], slope * factor, None, None


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
