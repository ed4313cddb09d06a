"""What an expert's tokens add to `dot`, `scatter` and `weights`, multiplied by AMX: 32 rows by 32 columns at a time.

    left       rows of words, side by side: of tokens for `dot` and `scatter`, of neurons for `weights`
    right      panels: 16 columns of words, one word of each after the other, as the instruction wants them
    step       two tiles of each, 16 words further; four products are added to four tiles of sums

AMX reads rows at equal distances, so here, unlike in the other loops, rows are copied to where they stand side by side.
`reorder.py` makes panels of `dot`'s weights, `scatter.py` of its own; of `weights`' tokens they are made here, once for
all neurons. What does not fill its tiles is filled up, along the sum with zeros. A sum is made in the order of its
words, so its bits depend neither on what other rows are in its block nor on how many.

Shapes as in `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from switchable.compute.cpu.amx import ROWS
from switchable.compute.cpu.experts.kernels import Loops
from switchable.compute.cpu.experts.reorder import transpose
from switchable.compute.cpu.llvm import I32, Index, Writer

BLOCK = 2 * ROWS
"""Rows, and columns, of a product."""
WORD = 4
"""Bytes."""
LEFT, RIGHT = 4, 6
"""First tiles of the factors; the four before them are the sums'."""


class Words(NamedTuple):
    """Rows or panels in memory."""

    address: ir.Value
    apart: int
    """Words from one to the next."""


class Blocks:
    """Writes products into a function."""

    def __init__(self, loops: Loops, w: Writer):
        assert loops.amx is not None
        self.loops, self.amx, self.w, self.sums = loops, loops.amx, w, w.scratch(BLOCK * BLOCK)

    def each(
        self,
        count: ir.Value,
        width: int,
        source: Callable[[ir.Value], ir.Value],
        words: int,
        body: Callable[[ir.Value, ir.Value, Words], None],
    ) -> None:
        """Copy up to 32 rows at a time side by side, and do something with them.

        Args:
            count: of rows.
            width: words of a copied row; those after its own are zero.
            source: the address of a row.
            words: its own.
            body: is given the first row's number, how many there are, and the copies.
        """
        w, memory = self.w, self.w.scratch(BLOCK * width)
        if width > words:
            w.range(0, BLOCK * width, ROWS, lambda word: w.store(w.zero(), w.at(memory, word)))

        def block(i: ir.Value) -> None:
            def copy(r: ir.Value) -> None:
                own, target = source(w.add(i, r)), w.at(memory, w.mul(r, width))

                def part(word: ir.Value, lanes: int) -> None:
                    w.store(w.load(w.at(own, word), w.vector_of(lanes)), w.at(target, word))

                w.tiles(words, self.loops.tails, part)

            many = w.minimum(w.sub(count, i), BLOCK)
            w.each(many, copy)
            body(i, many, Words(memory, width))

        w.range(0, count, BLOCK, block)

    def multiply(
        self,
        left: Words,
        right: Words,
        steps: Index,
        rows: ir.Value,
        finish: Callable[[ir.Value, int, ir.Value], None],
        panels: int = 2,
    ) -> None:
        """Multiply up to 32 rows with one or two panels.

        Args:
            left: rows, in memory of 16 or 32.
            right: panels.
            steps: of 16 words.
            rows: how many results are wanted.
            finish: is given a row's number, a panel's, and the vector of their sums.
            panels: how many.
        """
        w = self.w
        with w.b.if_else(w.compare(rows, ">", ROWS)) as (two, one):
            with two:
                self._sum(left, right, steps, 2, panels)
            with one:
                self._sum(left, right, steps, 1, panels)

        def row(r: ir.Value) -> None:
            for panel in range(panels):
                finish(r, panel, w.load(w.at(self.sums, w.add(w.mul(r, BLOCK), panel * ROWS))))

        w.each(rows, row)

    def add(
        self,
        left: Words,
        right: Words,
        steps: Index,
        rows: ir.Value,
        place: Callable[[ir.Value], ir.Value],
        new: ir.Value | None = None,
    ) -> None:
        """Add products to what stands at the place of each row, which is asked for before; to zero if it is `new`."""
        w = self.w

        def put(r: ir.Value, panel: int, sums: ir.Value) -> None:
            address = w.at(place(r), panel * ROWS)
            before = w.load(address)
            # New memory may hold NaNs: a select ignores them, a product with 0 would not.
            before = before if new is None else w.b.select(new, w.zero(), before)
            w.store(w.b.fadd(before, sums), address)

        w.each(rows, lambda r: w.prefetch(place(r), 2))
        self.multiply(left, right, steps, rows, put)

    def _sum(self, left: Words, right: Words, steps: Index, high: int, wide: int) -> None:
        """Multiply and add up, `high` tiles of rows by `wide` panels."""
        amx, w, b = self.amx, self.w, self.w.b
        tiles = [(2 * r + panel, r, panel) for r in range(high) for panel in range(wide)]
        for total, _, _ in tiles:
            amx.zero(b, total)

        def step(number: ir.Value) -> None:
            for r in range(high):
                address = w.at(left.address, w.add(w.mul(number, ROWS), r * ROWS * left.apart))
                amx.load(b, LEFT + r, address, WORD * left.apart)
            for panel in range(wide):
                address = w.at(right.address, w.add(w.mul(number, ROWS * ROWS), panel * right.apart))
                amx.load(b, RIGHT + panel, address, WORD * ROWS)
            for total, r, panel in tiles:
                amx.multiply_add(b, total, LEFT + r, RIGHT + panel)

        w.each(steps, step)
        for total, r, panel in tiles:
            amx.store(b, total, w.at(self.sums, r * ROWS * BLOCK + panel * ROWS), WORD * BLOCK)


def dot_by_amx(loops: Loops, w: Writer, finish: Callable[[ir.Value, ir.Value, Index], None]) -> None:
    """Multiply an expert's tokens with its neurons; `finish` is given sums, their row and first neuron."""
    count, tokens, x, packed = w.arguments[:4]
    blocks, width = Blocks(loops, w), loops.words_D
    whole = loops.I // BLOCK * BLOCK
    rest = [min(ROWS, loops.I - neuron) for neuron in range(whole, loops.I, ROWS)]

    def block(i: ir.Value, many: ir.Value, rows: Words) -> None:
        def columns(neuron: Index, lanes: list[int]) -> None:
            def put(r: ir.Value, panel: int, sums: ir.Value) -> None:
                present = sums if lanes[panel] == ROWS else w.shuffle(sums, range(lanes[panel]))
                finish(present, w.add(i, r), w.add(neuron, panel * ROWS))

            right = Words(w.at(packed, w.mul(neuron, width)), ROWS * width)
            blocks.multiply(rows, right, width // ROWS, many, put, len(lanes))

        w.range(0, whole, BLOCK, lambda neuron: columns(neuron, [ROWS, ROWS]))
        if rest:
            columns(whole, rest)

    blocks.each(count, width, lambda i: loops.row(w, x, tokens, i, words=width), width, block)


def scatter_by_amx(loops: Loops, w: Writer) -> None:
    """Add an expert's part to its tokens' rows."""
    count, tokens, y, weights, z = w.arguments
    blocks, width, words = Blocks(loops, w), loops.packing.scatter_words, loops.words_I

    def block(i: ir.Value, many: ir.Value, rows: Words) -> None:
        def columns(d: ir.Value) -> None:
            def place(r: ir.Value) -> ir.Value:
                return w.at(loops.row(w, y, tokens, w.add(i, r), words=loops.D), d)

            right = Words(w.at(weights, w.mul(d, width)), ROWS * width)
            blocks.add(rows, right, width // ROWS, many, place)

        w.range(0, loops.D, BLOCK, columns)

    blocks.each(count, width, lambda i: w.at(z, w.mul(i, words)), words, block)
    w.b.ret_void()


def weights_by_amx(loops: Loops, w: Writer) -> None:
    """Add the products of tokens to some columns of their expert's gradient; to zero if the gradient is `new`."""
    count, places, tokens, x, gradient, z, words, start, stop, new = w.arguments
    most = loops.packing.gradient_tokens // 2
    blocks, panels = Blocks(loops, w), w.scratch(most * BLOCK)
    steps = w.div(w.add(count, BLOCK - 1), BLOCK)

    def pair(i: ir.Value, address: Callable[[ir.Value], ir.Value], lanes: int) -> ir.Value:
        """Words of the tokens 2i and 2i + 1, zero for one that is not there."""
        first, second = w.mul(i, 2), w.add(w.mul(i, 2), 1)
        left, right = (address(w.minimum(own, w.sub(count, 1))) for own in (first, second))
        both = loops.pair_up(w, left, right, lanes, w.compare(second, ">=", count))
        return w.b.select(w.compare(first, ">=", count), w.zero(both.type), both)

    def values(step: ir.Value, j: Index, lanes: int) -> None:
        """Transpose the values that some neurons have for 32 tokens."""

        def at_value(own: ir.Value) -> ir.Value:
            place = w.integer(w.at(places, own, I32))
            return loops.at_z(w, z, w.add(w.mul(place, loops.I), j))

        table = [pair(w.add(w.mul(step, ROWS), r), at_value, lanes) for r in range(ROWS)]
        full = [w.shuffle(row, [min(lane, lanes - 1) for lane in range(ROWS)]) for row in table]
        for r, row in enumerate(transpose(w, full, 1)):
            w.store(row, w.at(words, w.add(w.mul(w.add(j, r), most), w.mul(step, ROWS))))

    def step_values(step: ir.Value) -> None:
        whole = loops.I // ROWS * ROWS
        w.range(0, whole, ROWS, lambda j: values(step, j, ROWS))
        if whole < loops.I:
            values(step, whole, loops.I - whole)

    def columns(d: ir.Value) -> None:
        def at_x(own: ir.Value) -> ir.Value:
            address = loops.at_z(w, loops.row(w, x, tokens, own, words=loops.words_D), d)
            w.prefetch(w.at(address, ROWS), 1)  # the next columns
            return address

        def inputs(i: ir.Value) -> None:
            both = pair(i, at_x, BLOCK)
            for panel in range(2):
                own = w.shuffle(both, range(panel * ROWS, (panel + 1) * ROWS))
                w.store(own, w.at(panels, w.mul(w.add(i, panel * most), ROWS)))

        def neurons(j: ir.Value) -> None:
            def place(r: ir.Value) -> ir.Value:
                return w.at(gradient, w.add(w.mul(w.add(j, r), loops.D), d))

            left = Words(w.at(words, w.mul(j, most)), most)
            rows = w.minimum(w.sub(loops.I, j), BLOCK)
            blocks.add(left, Words(panels, ROWS * most), steps, rows, place, new)

        w.each(w.mul(steps, ROWS), inputs)
        w.range(0, loops.I, BLOCK, neurons)

    w.each(steps, step_values)
    w.range(start, stop, BLOCK, columns)
    w.b.ret_void()
