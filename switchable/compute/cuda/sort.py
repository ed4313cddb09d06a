"""(token, slot) pairs in expert order, by torch's own sort: on any device, and the host waits for nothing.

Shapes: T tokens, K experts per token, E experts, R = T·K rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The R pairs in expert order, all int32."""

    order_R: Tensor
    """Row -> pair t·K + k that it holds."""
    position_R: Tensor
    """Pair -> its row: the inverse of `order_R`."""
    ends_E: Tensor
    """One past the last row of each expert."""


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> Rows:
    """Return the pairs of `expert_ids_TK` in expert order, stable."""
    sorted_R, order_R = expert_ids_TK.reshape(-1).sort(stable=True)
    rows_R = torch.arange(len(order_R), dtype=torch.int32, device=order_R.device)
    position_R = torch.empty_like(rows_R).scatter_(0, order_R, rows_R)
    experts_E = torch.arange(num_experts, device=order_R.device)
    ends_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    return Rows(order_R.to(torch.int32), position_R, ends_E)
