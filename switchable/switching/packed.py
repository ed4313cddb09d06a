"""Optimizer state of 8 bits or fewer: codes, and a scale for each block of them.

    torchao         a type of tensor that can `dequantize`; `copy_` writes it
    bitsandbytes    `state1` (codes), `qmap1` (the number that each stands for), `absmax1` (a scale for every 256 codes)

A block may hold numbers of many neurons. So all are read, moved and rounded again, as in each step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

BLOCK = 256
"""Codes of bitsandbytes that have one scale."""
Move = Callable[[Tensor, int, Tensor], None]
"""Reorders a tensor along a dimension in place: entry perm[i] becomes i (`ranks.permute`)."""


def packed_in(entries: Mapping[Any, Any], owner: Tensor) -> dict[Any, Move | None]:
    """Return how what an optimizer keeps packed of a parameter moves, by key; None for tables and scales."""
    found: dict[Any, Move | None] = {}
    for key, value in entries.items():
        if not isinstance(value, Tensor) or value.shape != owner.shape:
            continue
        table, scales = (f"{name}{str(key).removeprefix('state')}" for name in ("qmap", "absmax"))
        if type(value).dequantize is not Tensor.dequantize:
            found[key] = _move_typed
        elif value.dtype == torch.uint8 and value.is_contiguous() and table in entries and scales in entries:
            move = partial(_move_codes, table=entries[table], scales=entries[scales])
            found |= {key: move, table: None, scales: None}
    return found


@torch.no_grad()
def _move_typed(codes: Tensor, dim: int, perm: Tensor) -> None:
    codes.copy_(codes.dequantize().index_select(dim, perm.to(codes.device)))


@torch.no_grad()
def _move_codes(codes: Tensor, dim: int, perm: Tensor, table: Tensor, scales: Tensor) -> None:
    scale = scales.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    numbers = (table[codes.long()] * scale).index_select(dim, perm.to(codes.device)).flatten()
    blocks = nnf.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    scales.copy_(blocks.abs().amax(dim=1))
    parts = blocks / scales.clamp_min(torch.finfo(scales.dtype).tiny)[:, None]
    nearest = torch.bucketize(parts, (table[1:] + table[:-1]) / 2).flatten()
    codes.copy_(nearest[: len(numbers)].view(codes.shape))
