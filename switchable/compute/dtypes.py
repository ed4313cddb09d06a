"""Which dtype a call is computed in, and whether a backend takes it: said once for all of them.

A backend computes in the dtype that `nn.Linear` would: autocast's where autocast is on, else the input's.

Shapes: see `call.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from switchable.compute.call import ExpertCall


def autocasts(call: ExpertCall) -> bool:
    """Return whether autocast decides the dtype: like `nn.Linear`, it leaves float64 alone."""
    x_TD = call.x_TD
    return torch.is_autocast_enabled(x_TD.device.type) and x_TD.dtype != torch.float64


def compute_dtype(call: ExpertCall) -> torch.dtype:
    """Return the dtype that the products of a call are computed in."""
    return torch.get_autocast_dtype(call.x_TD.device.type) if autocasts(call) else call.x_TD.dtype


def why_not_dtype(call: ExpertCall, allowed: tuple[torch.dtype, ...]) -> str | None:
    """Return None, or why a backend that computes in the `allowed` dtypes cannot take a call."""
    given = {tensor.dtype for tensor in (call.x_TD, *call.weights.tensors)}
    if len(given) > 1 and not autocasts(call):
        return f"wants one dtype, and input and weights have {_names(given)}; convert them, or use torch.autocast"
    dtype = compute_dtype(call)
    if dtype not in allowed:
        return f"computes in {_names(allowed)} on {call.x_TD.device.type}, not in {_names([dtype])}"
    return None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
