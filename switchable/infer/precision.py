"""In what precision a finished model multiplies: one asked for, else the one it was trained in, else its weights'."""

from __future__ import annotations

import torch
from torch import nn


def chosen_precision(model: nn.Module, asked: str | None = None, trained: str | None = None) -> str:
    """Return the name of the precision, as `"float32"`; `trained` is that of the model's run, if there is one."""
    return asked or trained or str(next(model.parameters()).dtype).removeprefix("torch.")


def multiplying_in(model: nn.Module, precision: str) -> torch.autocast:
    """Return the context in which a model multiplies so: bfloat16 is autocast, as in training, of wider weights.

    For float32 the model is converted, if its weights have fewer bits.
    """
    if precision == "float32":
        model.float()
    weight = next(model.parameters())
    narrows = precision == "bfloat16" and weight.dtype != torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=narrows)
