"""The optimizer and its learning rate: torch.optim, parameter groups, a trapezoid.

    lr(step) = peak · min(1, (step+1)/warmup, (steps-step)/decay)

Matrices decay, vectors do not; routers have a learning rate of their own and no decay, and they are left out of the
gradient clipping so that learning to route never changes how the model learns.

With `muon` (Jordan et al. 2024, torch.optim.Muon) the matrices between embeddings and output head are trained by it,
all else by AdamW. Its updates are scaled to the size of AdamW's (Liu et al. 2025): the learning rate is the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from switchable.ffn.convert import is_router_parameter
from switchable.sections import TrainConfig


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the group `matrices`, AdamW for the others; to its caller one optimizer."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {})
        muon = [group for group in self.param_groups if group["name"] == "matrices"]
        rest = [group for group in self.param_groups if group["name"] != "matrices"]
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=betas, fused=True),
        )
        # The same groups and the same state: learning rates are set, and moments stored and moved, in one place.
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self._parts:
            part.step()


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return a converted model's optimizer: groups `matrices`, `vectors` and `routers`, for Muon `embeddings` too."""
    of_tokens = {id(p) for p in _embeddings_and_head(model)} if config.optimizer == "muon" else set()
    found: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "routers": [], "embeddings": []}
    for name, parameter in model.named_parameters():
        kind = "routers" if is_router_parameter(name) else "matrices" if parameter.ndim >= 2 else "vectors"
        found["embeddings" if id(parameter) in of_tokens else kind].append(parameter)
    groups = [
        {
            "name": name,
            "params": params,
            "weight_decay": config.weight_decay if name in ("matrices", "embeddings") else 0.0,
            "peak": config.router_learning_rate if name == "routers" else config.learning_rate,
            "lr": config.learning_rate,
        }
        for name, params in found.items()
        if params
    ]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.beta1)
    if config.optimizer == "muon":
        return MuonAdamW(groups, betas)
    # One pass over each tensor; the default makes ten, 5 % of a small model's step.
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def _embeddings_and_head(model: nn.Module) -> list[nn.Parameter]:
    """The matrices whose rows belong to tokens or positions: Muon is not for them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is head]
    return [p for module in modules for p in module.parameters(recurse=False)]


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Set every group's learning rate for step `step` (counted from 0); return that of the first group."""
    rising = (step + 1) / max(1.0, config.warmup_fraction * config.steps)
    falling = (config.steps - step) / max(1.0, config.decay_fraction * config.steps)
    factor = min(1.0, rising, falling)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def clip_gradients(optimizer: torch.optim.Optimizer, largest_norm: float) -> None:
    """Scale the gradients of everything but the routers down to a global norm of at most `largest_norm`."""
    groups = [group["params"] for group in optimizer.param_groups if group["name"] != "routers"]
    if largest_norm > 0:
        nn.utils.clip_grad_norm_(itertools.chain(*groups), largest_norm)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within the `with` block all weights are float32, in which small updates are not rounded away; then as before."""
    kept = {name: tensor.dtype for name, tensor in _tensors(model)}
    model.float()
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(kept[name])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
