"""The (token, expert) pairs of a batch in expert order, cut into chunks and lanes: what `sorted` walks through.

An expert's tokens are cut into *lanes* of equal length, one per thread, for products that are batched over lanes.
To make lanes equal, its list of tokens is padded with repetitions of the last one. Whoever uses the pairs sets the
activations of the padding to zero; then all that it adds is zero.

Shapes: T tokens, E experts, K experts per token, P sorted pairs (the T·K pairs and the padding), L lanes, R rows
of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK_ROWS = 2048
"""Most tokens of one expert that are multiplied at once: bounds the buffers when a router is badly balanced."""
MAX_LANES = 8
"""With more threads than this, lanes get too short, and products run on all threads in one piece."""
MIN_LANE_ROWS = 64
"""Shorter lanes cost more than they gain."""


class Chunk(NamedTuple):
    """Tokens of one expert that are multiplied at once."""

    expert: int
    rows: int
    """How many of the P sorted pairs; a multiple of the lanes."""
    tokens: int
    """Rows without the padding at the end."""
    first: bool
    """Whether the expert's weight gradients are to be written (or else added to)."""


@dataclass(frozen=True)
class SortedPairs:
    """The T·K (token, expert) pairs in expert order, cut into chunks."""

    tokens_P: Tensor
    """Token of each sorted pair; ascending within an expert."""
    chunks: list[Chunk]
    unused: list[int]
    """Experts without a token."""
    lanes: int
    most_rows: int
    """Of a chunk."""

    @classmethod
    def sort(cls, expert_ids_TK: Tensor, num_experts: int) -> SortedPairs:
        """Sort once for both passes; numpy's stable sort of small integers is a radix sort."""
        flat = expert_ids_TK.reshape(-1)
        counts: list[int] = torch.bincount(flat, minlength=num_experts).tolist()[:num_experts]
        lanes = _lanes(len(flat) // num_experts)
        keys = flat.to(torch.int16 if num_experts < 2**15 else torch.int32)
        order = np.argsort(keys.numpy(), kind="stable")[: sum(counts)]  # behind them: pairs with no expert
        padding = [-count % lanes for count in counts]
        if any(padding):
            ends = np.repeat(np.cumsum(counts), padding)
            order = np.insert(order, ends, order[ends - 1])
        tokens = order // max(expert_ids_TK.shape[1], 1)  # numpy divides by a scalar much faster than torch
        chunks = _cut(counts, lanes)
        return cls(
            torch.from_numpy(tokens),
            chunks,
            [expert for expert, count in enumerate(counts) if count == 0],
            lanes,
            max((chunk.rows for chunk in chunks), default=0),
        )

    def parts(self, values_P: Tensor) -> tuple[Tensor, ...]:
        """One view per chunk."""
        return values_P.split_with_sizes([chunk.rows for chunk in self.chunks])

    def by_lane(self, values_RX: Tensor) -> Tensor:
        """A chunk's values with a dimension for lanes."""
        return values_RX.view(self.lanes, -1, values_RX.shape[1])


def _lanes(mean_rows: int) -> int:
    threads = torch.get_num_threads()
    return threads if threads <= MAX_LANES and mean_rows >= threads * MIN_LANE_ROWS else 1


def _cut(counts: list[int], lanes: int) -> list[Chunk]:
    chunks, longest = [], CHUNK_ROWS - CHUNK_ROWS % lanes
    for expert, count in enumerate(counts):
        for done in range(0, count, longest):
            tokens = min(longest, count - done)
            chunks.append(Chunk(expert, tokens + -tokens % lanes, tokens, done == 0))
    return chunks
