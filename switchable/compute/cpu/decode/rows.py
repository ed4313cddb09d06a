"""Rows of a matrix of weights, of whatever width, as the vectors of float32 that are multiplied.

    float32   as they are          bfloat16   the upper half of one          int8   whole numbers, times a scale per row

Reading weights is what decoding takes time for, and widening them costs one or two instructions a vector, which the
memory's slowness hides. Inputs and sums stay float32.

Shapes: T tokens, D d_model or whatever a row has.
"""

from __future__ import annotations

import math

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.llvm import CACHE_LINE, I32, Index, Values, Writer

TYPES = {torch.float32: ir.FloatType(), torch.bfloat16: ir.IntType(16), torch.int8: ir.IntType(8)}
"""Of the numbers in memory."""
NUMBERS = (torch.float32, torch.bfloat16)
"""Dtypes of tokens, of biases and of a router."""
LARGEST = 127
"""Of an int8, either sign."""
AT_ONCE = 256
"""Rows that are rounded together: all of a head at once would take its memory twice more."""


class Rows:
    """How code reads rows of weights.

    Args:
        dtype: of the weights, a key of `TYPES`.
        width: D, where it is known when code is compiled; of others the greatest common divisor.
        lanes: of a vector.
    """

    def __init__(self, dtype: torch.dtype, width: int, lanes: int):
        self.kind, self.dtype, self.lanes = TYPES[dtype], dtype, lanes
        self.in_line = math.gcd(width // lanes, max(1, CACHE_LINE // (lanes * dtype.itemsize)))
        """Vectors that are read together: a line of the cache, or what divides the row."""

    @property
    def scaled(self) -> bool:
        """Whether every row has a scale."""
        return self.dtype == torch.int8

    def at(self, w: Writer, base: ir.Value, index: Index) -> ir.Value:
        """The address of a weight."""
        return w.at(base, index, self.kind)

    def load(self, w: Writer, address: ir.Value, lanes: int | None = None) -> ir.Value:
        """A vector of weights, widened; of other than the usual length if it is given."""
        lanes = lanes or self.lanes
        vector = w.vector_of(lanes)
        if self.dtype == torch.float32:
            return w.load(address, vector)
        narrow, wide = ir.VectorType(self.kind, lanes), ir.VectorType(I32, lanes)
        read = w.b.load(address, align=self.dtype.itemsize, typ=narrow)
        if self.dtype == torch.int8:
            return w.b.sitofp(w.b.sext(read, wide), vector)
        upper = w.b.shl(w.b.zext(read, wide), ir.Constant(wide, [16] * lanes))
        return w.b.bitcast(upper, vector)

    def store(self, w: Writer, value: ir.Value, address: ir.Value) -> None:
        """Write a vector, rounded; not of int8."""
        if self.dtype == torch.float32:
            w.store(value, address)
            return
        # By whole numbers: only AVX512-BF16 has an instruction, elsewhere LLVM calls a function that is not here.
        b, wide = w.b, ir.VectorType(I32, self.lanes)
        half, one, sixteen, nan = (ir.Constant(wide, [n] * self.lanes) for n in (0x7FFF, 1, 16, 0x7FC0))
        bits = b.bitcast(value, wide)
        even = b.add(half, b.and_(b.lshr(bits, sixteen), one))
        upper = b.select(b.fcmp_unordered("uno", value, value), nan, b.lshr(b.add(bits, even), sixteen))
        b.store(b.trunc(upper, ir.VectorType(self.kind, self.lanes)), address, align=2)

    def vectors(self, w: Writer, address: ir.Value, count: int) -> list[ir.Value]:
        """Neighbouring vectors."""
        return [self.load(w, self.at(w, address, v * self.lanes)) for v in range(count)]

    def prefetch(self, w: Writer, address: ir.Value, vectors: int) -> None:
        """Ask for neighbouring vectors; what lies there may be nothing."""
        w.prefetch(address, -(-vectors * self.dtype.itemsize // w.itemsize))

    def dots(
        self, w: Writer, rows: Values, following: Values, inputs: Values, width: Index
    ) -> list[list[ir.Value]]:
        """For each of some inputs its products with each row, given their addresses, as vectors to be added up.

        The following rows are prefetched.
        """

        def step(d: ir.Value, sums: Values) -> Values:
            for address in following:
                self.prefetch(w, self.at(w, address, d), self.in_line)
            total = list(sums)
            for v in range(self.in_line):
                place = w.add(d, v * self.lanes)
                xs = [w.load(w.at(x, place)) for x in inputs]
                for r, row in enumerate(rows):
                    weights = self.load(w, self.at(w, row, place))
                    for t, x in enumerate(xs):
                        total[t * len(rows) + r] = w.fma(weights, x, total[t * len(rows) + r])
            return total

        zeros = [w.zero()] * (len(rows) * len(inputs))
        _, sums = w.loop(0, width, self.lanes * self.in_line, zeros, step)
        return [list(sums[first : first + len(rows)]) for first in range(0, len(sums), len(rows))]


def quantised(weight_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in 8 bits and the scale of each row, float32: weight ≈ scale · int8.

    A row of zeros has scale 0.
    """
    device = weight_ND.device
    rounded_ND = torch.empty(weight_ND.shape, dtype=torch.int8, device=device)
    scale_N = torch.empty(len(weight_ND), dtype=torch.float32, device=device)
    for first in range(0, len(weight_ND), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        scale_N[some] = weight_ND[some].abs().amax(1).float() / LARGEST
        divisor_N1 = scale_N[some].clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        rounded_ND[some] = (weight_ND[some].float() / divisor_N1).round_()
    return rounded_ND, scale_N
