"""What a training loop makes of the model's loss, so that losses attached to single layers are treated alike.

    loop     (factor · model(**batch).loss).backward()          1 / micro-batches, a GradScaler's scale, ...
    layer    gradient of an attached loss = factor · its own

A layer does not see the model's loss. But the first thing that a backward pass computes is that loss's gradient, which
is the factor. A hook on the loss notes it, and the layers, whose turn comes later, read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from switchable.compute.eager import eager


class LossScale:
    """The factor of a model's loss, shared by its layers."""

    def __init__(self) -> None:
        self.unseen = 1.0
        """The factor where the loss is computed outside the model, which cannot be seen: for the loop to set."""
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
    def _end(self, _model: nn.Module, _args: Any, inputs: Mapping[str, Any], output: Any) -> None:
        loss, now, share = _loss_in(output), self.now, _share(inputs)

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
