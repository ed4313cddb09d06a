"""The optimizer and its learning rate: torch.optim, three parameter groups, a trapezoid.

    lr(step) = peak · min(1, (step+1)/warmup, (steps-step)/decay)

Matrices decay, vectors do not; routers have a learning rate of their own and no decay, and they are left out of the
gradient clipping so that learning to route never changes how the model learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from switchable.ffn.convert import is_router_parameter
from switchable.sections import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer with the groups `matrices`, `vectors` and `routers`.

    Args:
        model: the converted model.
        config: optimizer name, learning rates, weight decay, betas.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    routers: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = routers if is_router_parameter(name) else matrices if parameter.ndim >= 2 else vectors
        group.append(parameter)
    groups = [
        {
            "name": "matrices",
            "params": matrices,
            "weight_decay": config.weight_decay,
            "peak": config.learning_rate,
        },
        {"name": "vectors", "params": vectors, "weight_decay": 0.0, "peak": config.learning_rate},
        {"name": "routers", "params": routers, "weight_decay": 0.0, "peak": config.router_learning_rate},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.beta1)
    # One pass over each tensor; the default makes ten, 5 % of a small model's step.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at step `step` (counted from 0), in (0, 1]."""
    rising = (step + 1) / max(1.0, config.warmup_fraction * config.steps)
    falling = (config.steps - step) / max(1.0, config.decay_fraction * config.steps)
    return min(1.0, rising, falling)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Set every group's learning rate for step `step`; return that of the first group."""
    factor = learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def clip_gradients(optimizer: torch.optim.Optimizer, largest_norm: float) -> None:
    """Scale the gradients of everything but the routers down to a global norm of at most `largest_norm`."""
    if largest_norm > 0:
        nn.utils.clip_grad_norm_(_model_parameters(optimizer), largest_norm)


def _model_parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    for group in optimizer.param_groups:
        if group["name"] != "routers":
            yield from group["params"]


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
