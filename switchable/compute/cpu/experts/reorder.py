"""Copying an expert's weights into the order in which `dot` reads them, so that its inner loop reads straight on.

    [I, D]  ->  vectors of neurons, steps through a token's words, neurons of a vector, p neighbouring words

Squares of L/p neurons by L words are transposed in registers, p words staying together: it costs 1/T of a product.
Lanes of the last vector that have no neuron are zero.

Shapes: D d_model, I neurons per expert, L lanes of a vector, p words of a token that share a vector.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import Writer


def write_reorder(w: Writer, packing: Packing) -> None:
    """Write the body of a function of two addresses: an expert's weights [I, D], and where they go."""
    weights, packed = w.arguments
    rows, lanes, width = packing.neurons_per_vector, packing.lanes, packing.steps * packing.inputs_per_vector

    def square(d: ir.Value, v: int) -> None:
        present = min(rows, packing.neurons - v * rows)
        table = [
            w.load(w.at(weights, w.add(d, (v * rows + r) * width))) if r < present else w.zero()
            for r in range(rows)
        ]
        step = w.mul(w.div(d, packing.inputs_per_vector), lanes)
        for r, row in enumerate(transpose(w, table, packing.inputs_per_vector)):
            w.store(row, w.at(packed, w.add(step, (v * packing.steps + r) * lanes)))

    for v in range(packing.vectors):
        w.range(0, width, lanes, partial(square, v=v))
    w.b.ret_void()


def transpose(w: Writer, table: list[ir.Value], p: int) -> list[ir.Value]:
    """Transpose a square of vectors whose entries are p numbers: swap its off-diagonal quarters, then theirs."""
    half = len(table) // 2
    while half:
        swapped = list(table)
        for r in range(len(table)):
            if not r & half:
                above, below = table[r], table[r + half]
                swapped[r] = w.shuffle(above, _lanes(len(table), p, half, low=True), below)
                swapped[r + half] = w.shuffle(above, _lanes(len(table), p, half, low=False), below)
        table, half = swapped, half // 2
    return table


def _lanes(size: int, p: int, half: int, *, low: bool) -> list[int]:
    """Which lanes of two vectors side by side make the upper or the lower one of two rows."""
    entries = []
    for column in range(size):
        if low:
            entries.append(column if not column & half else size + column - half)
        else:
            entries.append(column + half if not column & half else size + column)
    return [entry * p + number for entry in entries for number in range(p)]
