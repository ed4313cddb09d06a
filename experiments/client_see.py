"""What a model computes for a batch, and how far two of them are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.client_build import seed
from switchable.ffn.convert import is_router_parameter
from switchable.ffn.trial import module_state


@dataclass
class Seen:
    """What a model computes, dropout off and on, and its gradients."""

    out: Tensor
    trained: Tensor
    gradients: dict[str, Tensor]


def see(model: Any, batch: Mapping[str, Any]) -> Seen:
    """Compute everything that must stay: the output, one with dropout, and the gradients of a sum of outputs."""
    model.eval()
    out = output(model, batch, grad=True)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * weights).mean().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = {n: g.clone() for n, g in named.items() if not is_router_parameter(n)}
    model.zero_grad()
    with module_state(
        model
    ):  # a BatchNorm's statistics move in training; the next comparison begins with the same
        trained = output(model.train(), batch)
    return Seen(out.detach(), trained, gradients)


def output(model: Any, batch: Mapping[str, Any], grad: bool = False) -> Tensor:
    """Return logits, or what a model without a head computes; random numbers begin anew."""
    seed(2)
    with torch.set_grad_enabled(grad):
        out = model(**batch)
    found: Tensor = out["logits"] if "logits" in out else out[0]
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖; infinite where that is no number."""
    apart = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
    return apart if math.isfinite(apart) else math.inf


def gradients_apart(a: Seen, b: Seen) -> float:
    """The largest relative difference of a parameter's gradient; small ones count as a thousandth of the largest."""
    if a.gradients.keys() != b.gradients.keys():
        return math.inf
    floor = 1e-3 * max(float(g.double().norm()) for g in b.gradients.values())
    return max(
        float((g.double() - b.gradients[n].double()).norm())
        / max(float(b.gradients[n].double().norm()), floor)
        for n, g in a.gradients.items()
    )
