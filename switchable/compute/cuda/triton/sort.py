# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Sort (token, slot) pairs by expert on the device: a counting sort in three launches, one for small batches.

    row of pair j = t·K + k  =  #{pairs of smaller experts} + #{earlier pairs of the same expert}

Each program counts its chunk of pairs per expert. One cumulative sum over the table [E, chunks], experts outermost,
then says where the pairs of each (expert, chunk) start. Each program ranks its own pairs and writes them. The result is
stable, hence deterministic. All sizes depend on shapes alone, so the host waits for nothing.

Why not torch's sort, as in `grouped_mm.py`? Sort, inverse and ends are some six launches there. Decoding one token
should take about as long as reading its experts' weights, which is the time of a few launches.

Shapes: T tokens, K experts per token, E experts, R = T·K rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """The R pairs in expert order, all int32."""

    order_R: Tensor
    """Row -> pair t·K + k that it holds."""
    position_R: Tensor
    """Pair -> its row: the inverse of `order_R`."""
    ends_E: Tensor
    """One past the last row of each expert."""


@triton.jit
def _hits(ids_ptr, rows, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr):
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pairs, mask=pairs < rows, other=-1).to(tl.int32)
    hits = (ids[:, None] == tl.arange(0, BLOCK_E)[None, :]).to(tl.int32)
    return pairs, hits


@triton.jit(do_not_specialize=["rows", "chunks"])
def _count_kernel(
    ids_ptr, counts_ptr, rows, chunks, E: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr
):
    _, hits = _hits(ids_ptr, rows, BLOCK_E, CHUNK)
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + experts * chunks + tl.program_id(0), tl.sum(hits, 0), mask=experts < E)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _place_kernel(
    ids_ptr,
    table_ptr,  # cumulative counts [E, chunks]; unused when SINGLE
    order_ptr,
    position_ptr,
    ends_ptr,
    rows,
    chunks,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    SINGLE: tl.constexpr,  # one chunk holds all pairs: no table needed
):
    pairs, hits = _hits(ids_ptr, rows, BLOCK_E, CHUNK)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.sum(hits, 0)
    if SINGLE:
        ends = tl.cumsum(counts, 0)
    else:
        ends = tl.load(table_ptr + experts * chunks + tl.program_id(0), mask=experts < E, other=0)
    earlier = tl.cumsum(hits, 0) - hits
    place = tl.sum(hits * ((ends - counts)[None, :] + earlier), 1)
    tl.store(order_ptr + place, pairs.to(tl.int32), mask=pairs < rows)
    tl.store(position_ptr + pairs, place, mask=pairs < rows)
    if tl.program_id(0) == chunks - 1:
        tl.store(ends_ptr + experts, ends, mask=experts < E)


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> Rows:
    """Return the pairs of `expert_ids_TK` in expert order, stable, without a host sync."""
    ids_R = expert_ids_TK.contiguous().view(-1)
    rows = ids_R.numel()
    block_e = max(16, triton.next_power_of_2(num_experts))
    # A program holds a table [CHUNK, BLOCK_E]: 8,192 entries are 64 registers per thread of 4 warps.
    chunk = max(16, 8192 // block_e)
    chunks = triton.cdiv(rows, chunk)
    single = chunks == 1
    order_R = torch.empty(rows, dtype=torch.int32, device=ids_R.device)
    position_R, ends_E = torch.empty_like(order_R), order_R.new_empty(num_experts)
    sizes = {"E": num_experts, "BLOCK_E": block_e, "CHUNK": chunk}
    table = ends_E
    if not single:
        counts = order_R.new_empty(num_experts * chunks)
        _count_kernel[(chunks,)](ids_R, counts, rows, chunks, **sizes)
        table = counts.cumsum(0, dtype=torch.int32)
    _place_kernel[(chunks,)](ids_R, table, order_R, position_R, ends_E, rows, chunks, **sizes, SINGLE=single)
    return Rows(order_R, position_R, ends_E)
