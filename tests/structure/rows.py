"""Rows in groups that are known, and the inertia by its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def planted(rows: int, width: int, groups: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around random directions, in groups as equal as can be, and their group."""
    generator = torch.Generator().manual_seed(seed)
    group_N = torch.randperm(rows, generator=generator) % groups
    center_GD = torch.nn.functional.normalize(torch.randn(groups, width, generator=generator), dim=1)
    return center_GD[group_N] + noise * torch.randn(rows, width, generator=generator) / width**0.5, group_N


def inertia_of(rows_ND: Tensor, labels_N: Tensor) -> float:
    """The definition: squared distances to the mean of the cluster, in float64."""
    rows_ND = rows_ND.double()
    groups = [rows_ND[labels_N == e] for e in labels_N.unique()]
    return float(sum((group - group.mean(0)).square().sum() for group in groups))
