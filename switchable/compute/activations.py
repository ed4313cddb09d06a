"""Activations by their names in transformers' `ACT2FN`.

ReLU and its square are built here, as transformers builds them: its table costs 0.15 GB of imports, and models that are
sparse need no other row of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RELU_TYPES = ("relu", "relu2")
"""Activations whose idle neurons are exactly zero; transformers calls them so."""


class ReLUSquared(nn.Module):
    """relu(x)²."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the squares of the positive numbers, 0 for the others."""
        return nn.functional.relu(x).square()


_BUILT_HERE: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu2": ReLUSquared}


def activation_named(name: str) -> nn.Module:
    """Return an activation; raise KeyError if there is none of this name."""
    if name in _BUILT_HERE:
        return _BUILT_HERE[name]()
    from transformers.activations import ACT2FN

    found: nn.Module = ACT2FN[name]
    return found


def names() -> list[str]:
    """Return the names of all, ReLU and its square first."""
    from transformers.activations import ACT2CLS

    return list(dict.fromkeys((*RELU_TYPES, *ACT2CLS)))


def activation_name(module: nn.Module) -> str | None:
    """Return the name of an activation's module, or None if it has none or has parameters."""
    own = next((name for name, kind in _BUILT_HERE.items() if type(module) is kind), None)
    if own is not None or list(module.parameters()):
        return own
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    from transformers.activations import ACT2CLS, ACT2FN

    x = torch.linspace(-12, 12, 97, dtype=torch.float32, device="cpu")
    for name, kind in ACT2CLS.items():
        same_class = type(module) is (kind[0] if isinstance(kind, tuple) else kind)
        if same_class and torch.allclose(ACT2FN[name](x), module(x)):  # settings count: a slope, a bound
            return str(name)
    return None


def has_zeros(name: str) -> bool:
    """Whether an activation is exactly zero at -1, as ReLU is, and GELU and SiLU are not."""
    return bool(activation_named(name)(torch.tensor(-1.0, device="cpu")) == 0)
