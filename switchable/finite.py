"""NaN and infinity: found before a model that holds them is kept, measured, exported or called good.

One bad gradient makes every weight NaN, and a checkpoint of such a model is worth nothing. The largest absolute value
of all tensors together is not finite if one of their numbers is not: one pass, one host sync.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from switchable import ranks
from switchable.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which tensor holds NaN or infinity, and how many numbers; None if all are finite.

    Of a sharded tensor it is this rank's part that counts.
    """
    here = {name: ranks.rows_here(tensor.detach())[0] for name, tensor in tensors.items()}
    plain = {n: t for n, t in here.items() if type(t) is Tensor}  # a library's quantised ones have no norm
    here = {n: t for n, t in plain.items() if t.dtype in FLOATS and t.numel() and not t.is_meta}
    if not here or bool(get_total_norm(list(here.values()), float("inf")).isfinite()):
        return None
    for name, tensor in here.items():
        if bad := int((~tensor.isfinite()).sum()):
            kind = "nan" if bool(tensor.isnan().any()) else "inf"
            return f"{name} holds {kind} ({bad:,} of {tensor.numel():,} numbers)"
    raise AssertionError("a norm is not finite, but every number is")


def check_finite(model: nn.Module, what: str, remedy: str) -> None:
    """Raise InputError, with the remedy, for a model (this rank's part of it) with a weight that is not finite."""
    if (found := not_finite(dict(model.named_parameters()))) is not None:
        raise InputError(f"{what} is not finite: {found}; {remedy}")
