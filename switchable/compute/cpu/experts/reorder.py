"""Copying an expert's weights into the order in which `dot` reads them.

    [I, D]  ->  vectors of neurons, steps through a token's numbers, neurons of a vector, p neighbouring numbers

Squares of L/p neurons by L numbers are transposed in registers, p numbers staying together. Lanes of the last vector
that have no neuron are zero.

Shapes: D d_model, I neurons per expert, L lanes of a vector, p numbers of a token that share a vector.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import Values, Writer, whole


def write_reorder(w: Writer, packing: Packing) -> None:
    """Write the body of a function of two addresses: an expert's weights [I, D], and where they go."""
    weights, packed = w.arguments
    rows, lanes, width = packing.neurons_per_vector, packing.lanes, packing.d_model

    def square(v: int) -> Callable[[ir.Value, Values], Values]:
        present = min(rows, packing.neurons - v * rows)

        def body(d: ir.Value, _: Values) -> Values:
            table = [
                w.load(w.at(weights, w.b.add(d, whole((v * rows + r) * width)))) if r < present else w.zero()
                for r in range(rows)
            ]
            step = w.b.mul(w.b.sdiv(d, whole(packing.together)), whole(lanes))
            for r, row in enumerate(_transposed(w, table, packing.together)):
                w.store(row, w.at(packed, w.b.add(step, whole((v * packing.steps + r) * lanes))))
            return []

        return body

    for v in range(packing.vectors):
        w.loop(whole(0), whole(width), whole(lanes), [], square(v))
    w.b.ret_void()


def _transposed(w: Writer, table: list[ir.Value], together: int) -> list[ir.Value]:
    """Transpose a square of vectors whose entries are `together` numbers: blocks change places, ever smaller ones."""
    half = len(table) // 2
    while half:
        swapped = list(table)
        for r in range(len(table)):
            if not r & half:
                above, below = table[r], table[r + half]
                swapped[r] = w.merged(above, below, _lanes(len(table), together, half, low=True))
                swapped[r + half] = w.merged(above, below, _lanes(len(table), together, half, low=False))
        table, half = swapped, half // 2
    return table


def _lanes(size: int, together: int, half: int, *, low: bool) -> list[int]:
    """Which lanes of two vectors side by side make the upper or the lower one of two rows."""
    entries = []
    for column in range(size):
        if low:
            entries.append(column if not column & half else size + column - half)
        else:
            entries.append(column + half if not column & half else size + column)
    return [entry * together + number for entry in entries for number in range(together)]
