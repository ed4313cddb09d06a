"""How `fused`'s loops tile an expert: by vectors, rows of tokens and blocks of columns.

A tile of results stays in registers. Its size is a compromise between reading each number for as many products as
possible and the number of registers.

An expert of fewer neurons than a vector has lanes would waste the others. So in `dot` a vector holds the products of p
neighbouring numbers of a token with L/p neurons, which are added up at the end. p is 1, 2 or 4, whatever wastes least;
`reorder.py` puts the weights in that order.

Shapes: D d_model, I neurons per expert, L lanes of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from switchable.compute.cpu.amx import AMX, ROWS
from switchable.compute.cpu.llvm import Machine

MANY_NEURONS = 24
"""From which a gradient's tiles pay that are wide rather than high."""
FIRST_LEVEL_CACHE = 32768
"""Bytes that it holds, at least."""


@dataclass(frozen=True)
class Packing:
    """The tiling of experts of I neurons and D inputs for a machine."""

    d_model: int
    neurons: int
    dtype: torch.dtype
    """Of what is multiplied: float32, float64, or bfloat16 in pairs."""
    machine: Machine

    @cached_property
    def lanes(self) -> int:
        return self.machine.vector_bytes // (8 if self.dtype == torch.float64 else 4)

    @property
    def terms(self) -> int:
        """Neighbouring terms of a sum that a lane multiplies and adds at once."""
        return 2 if self.dtype == torch.bfloat16 else 1

    @cached_property
    def amx(self) -> AMX | None:
        """What writes AMX's instructions, if the products are made by them: a vector is a row of a tile then."""
        return self.machine.amx if self.terms == 2 and self.lanes == ROWS else None

    @cached_property
    def inputs_per_vector(self) -> int:
        """p: words of a token that share a vector in `dot`."""
        if self.amx:
            return 1
        fits = [p for p in (1, 2, 4) if self.d_model // self.terms % p == 0 and p <= self.lanes]
        return min(fits, key=lambda p: (-(-self.neurons // (self.lanes // p)) * (self.lanes // p), p))

    @property
    def neurons_per_vector(self) -> int:
        return self.lanes // self.inputs_per_vector

    @cached_property
    def vectors(self) -> int:
        """Vectors of neurons, the last one possibly not full."""
        return -(-self.neurons // self.neurons_per_vector)

    @cached_property
    def steps(self) -> int:
        """Of `dot` through a token's words."""
        return self.d_model // self.terms // self.inputs_per_vector

    def columns(self, most: int) -> int:
        """Vectors in a block of columns."""
        return max(v for v in range(1, most + 1) if (self.d_model // self.lanes) % v == 0)

    @property
    def chunk_tokens(self) -> int:
        """In a chunk: their rows should stay in the second-level cache, and an expert's share fill many tiles."""
        return 1024 if self.amx else 512

    @property
    def scatter_words(self) -> int:
        """Words of an expert's neurons that `scatter` adds up by AMX, filled up to whole tiles."""
        return -(-self.neurons // self.terms // ROWS) * ROWS

    @property
    def scatter_columns(self) -> int:
        return self.columns(4 if self.machine.registers >= 32 else 2)

    @property
    def scatter_rows(self) -> tuple[int, ...]:
        return (6, 4, 2, 1) if self.scatter_columns == 4 else self.tile_rows

    @property
    def scatter_pieces(self) -> int:
        """In how many pieces `scatter` copies an expert's part of a block of columns."""
        block = self.neurons // self.terms * self.scatter_columns * self.machine.vector_bytes
        return -(-block // FIRST_LEVEL_CACHE)

    @property
    def gradient_tokens(self) -> int:
        """Whose products are added to `weights` at once; their columns are copied and should stay in the first-level
        cache, 256 bytes each, or 128 for AMX."""
        return 256 if self.amx else 128

    @property
    def gradient_stride(self) -> int:
        """Words from one neuron's values to the next one's, for AMX: rows at even distances would share cache lines."""
        return self.gradient_tokens // 2 + ROWS

    @property
    def gradient_words(self) -> int:
        """Words of those tokens' values, of all neurons, filled up to whole tiles."""
        if self.amx:
            return self.gradient_stride * -(-self.neurons // ROWS) * ROWS
        return self.gradient_tokens // 2 * self.neurons

    @property
    def gradient_kept(self) -> int:
        """Sums of an expert that AMX keeps until all its tokens are added, filled up to whole products."""
        return -(-self.neurons // (2 * ROWS)) * 2 * ROWS * self.d_model

    @property
    def gradient_sums(self) -> int:
        """Words of those sums, and of the rows of `gradient_tokens` behind them."""
        return self.gradient_kept + self.gradient_tokens // 2 * self.d_model

    @property
    def gradient_columns(self) -> int:
        if self.amx:
            return 2
        return self.columns(4 if self.machine.registers >= 32 and self.neurons >= MANY_NEURONS else 2)

    @property
    def gradient_rows(self) -> tuple[int, ...]:
        return (6, 4, 2, 1) if self.gradient_columns == 4 else self.tile_rows

    @property
    def tile_rows(self) -> tuple[int, ...]:
        """Rows of the tiles of results, the largest first."""
        return (8, 4, 2, 1) if self.machine.registers >= 32 else (4, 2, 1)


FEWEST_IN_TILES = 1024
"""Tokens of an expert times its neurons from which tiles pay: with fewer, making panels of weights takes longer."""
SMALLEST_IN_TILES = 8
"""Neurons of an expert; of fewer most of a tile would be filled up."""


def suited(machine: Machine, neurons: int, tokens: float) -> Machine:
    """Return the machine, without AMX where an expert has so few neurons or tokens that pairs are faster."""
    few = neurons < SMALLEST_IN_TILES or tokens * neurons < FEWEST_IN_TILES
    return replace(machine, amx=None) if few and machine.amx is not None else machine


def multiplied(d_model: int, neurons: int, dtype: torch.dtype, machine: Machine | None) -> torch.dtype:
    """Return the numbers that a machine multiplies where a call is computed in `dtype`; sums are float32 at least.

    Half precision is multiplied in float32, unless there is an instruction for it, and whole pairs and vectors.
    """
    if dtype == torch.bfloat16 and machine is not None and machine.pairs and neurons % 2 == 0:
        whole = d_model // 2 % (machine.vector_bytes // 4) == 0
        return torch.bfloat16 if whole else torch.float32
    return torch.float64 if dtype == torch.float64 else torch.float32
