"""What an expert's tokens add to `dot` and `scatter`, multiplied by AMX: 32 rows by 32 columns at a time.

    left       rows of words, side by side: of tokens for `dot` and `scatter`, of neurons for `weights`
    right      panels: 16 columns of words, one word of each after the other, as the instruction wants them
    step       two tiles of each, 16 words further; four products are added to four tiles of sums

AMX reads rows at equal distances, so here, unlike in the other loops, rows are copied to where they stand side by side.
`reorder.py` makes panels of `dot`'s weights, `scatter.py` of its own, `amx_gradient.py` of `weights`' tokens. What does
not fill its tiles is filled up, along the sum with zeros. A sum is made in the order of its words, so its bits depend
neither on what other rows are in its block nor on how many.

Shapes as in `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from switchable.compute.cpu.amx import ROWS
from switchable.compute.cpu.experts.kernels import Loops
from switchable.compute.cpu.llvm import I1, I64, POINTER, Index, Writer

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


class Kept(NamedTuple):
    """Sums of 32 rows by 32 columns, which several calls may add to."""

    address: ir.Value
    new: ir.Value
    """Whether this call is the first: sums begin with zero, whatever the memory holds."""
    last: ir.Value


class Blocks:
    """Writes products into a function."""

    def __init__(self, loops: Loops, w: Writer):
        assert loops.amx is not None
        self.amx, self.w, self.sums = loops.amx, w, w.scratch(BLOCK * BLOCK)

    def multiply(
        self,
        left: Words,
        right: Words,
        steps: Index,
        rows: ir.Value,
        finish: Callable[[ir.Value, int, ir.Value], None],
        panels: int = 2,
        kept: Kept | None = None,
        beside: Callable[[ir.Value], None] = lambda _: None,
    ) -> None:
        """Multiply up to 32 rows with one or two panels.

        Args:
            left: rows, in memory of 16 or 32.
            right: panels.
            steps: of 16 words.
            rows: how many results are wanted.
            finish: is given a row's number, a panel's, and the vector of their sums, by the last call.
            panels: how many.
            kept: the sums; none if this is the only call.
            beside: what is done in each step while tiles are multiplied, if there are more than 16 rows.
        """
        w, own = self.w, kept or Kept(self.sums, I1(1), I1(1))
        with w.b.if_else(w.compare(rows, ">", ROWS)) as (two, one):
            with two:
                self._sum(left, right, steps, 2, panels, own, beside)
            with one:
                self._sum(left, right, steps, 1, panels, own, lambda _: None)

        def row(r: ir.Value) -> None:
            for panel in range(panels):
                finish(r, panel, w.load(w.at(own.address, w.add(w.mul(r, BLOCK), panel * ROWS))))

        with w.b.if_then(own.last):
            w.each(rows, row)

    def _sum(
        self, left: Words, right: Words, steps: Index, high: int, wide: int, kept: Kept,
        beside: Callable[[ir.Value], None],
    ) -> None:  # fmt: skip
        """Multiply and add up, `high` tiles of rows by `wide` panels."""
        amx, w, b = self.amx, self.w, self.w.b
        tiles = [(2 * r + panel, r, panel) for r in range(high) for panel in range(wide)]
        places = [w.at(kept.address, r * ROWS * BLOCK + panel * ROWS) for _, r, panel in tiles]
        with b.if_else(kept.new) as (from_zero, from_memory):
            with from_zero:
                for total, _, _ in tiles:
                    amx.zero(b, total)
            with from_memory:
                for (total, _, _), place in zip(tiles, places, strict=True):
                    amx.load(b, total, place, WORD * BLOCK)

        def step(number: ir.Value) -> None:
            for r in range(high):
                address = w.at(left.address, w.add(w.mul(number, ROWS), r * ROWS * left.apart))
                amx.load(b, LEFT + r, address, WORD * left.apart)
            for panel in range(wide):
                address = w.at(right.address, w.add(w.mul(number, ROWS * ROWS), panel * right.apart))
                amx.load(b, RIGHT + panel, address, WORD * ROWS)
            for total, r, panel in tiles:
                amx.multiply_add(b, total, LEFT + r, RIGHT + panel)
            beside(number)

        w.each(steps, step)
        for (total, _, _), place in zip(tiles, places, strict=True):
            amx.store(b, total, place, WORD * BLOCK)


def dot_by_amx(loops: Loops, w: Writer, finish: Callable[[ir.Value, ir.Value, Index], None]) -> None:
    """Multiply an expert's tokens with its neurons; `finish` is given sums, their row and first neuron.

    While 32 tokens are multiplied the next ones' rows are copied, a part of each row in a step.
    """
    count, tokens, x, packed = w.arguments[:4]
    blocks, width = Blocks(loops, w), loops.words_D
    whole = loops.I // BLOCK * BLOCK
    rest = [min(ROWS, loops.I - neuron) for neuron in range(whole, loops.I, ROWS)]
    own_rows = -(-BLOCK // -(-loops.I // BLOCK))  # that are copied while a block of neurons is multiplied
    copied = BLOCK + own_rows % BLOCK  # the last ones are nobody's
    memory, next_rows = w.scratch(2 * copied * width), w.scratch(copied, I64)

    def copy(row: ir.Value, r: ir.Value, word: ir.Value, target: ir.Value) -> None:
        w.store(w.load(w.at(row, word)), w.at(target, w.add(w.mul(r, width), word)))

    def first(r: ir.Value) -> None:
        row = loops.row(w, x, tokens, r, words=width)
        w.range(0, width, ROWS, lambda word: copy(row, r, word, memory))

    def block(i: ir.Value) -> None:
        odd = w.b.and_(w.div(i, BLOCK), I64(1))
        ours, others = (w.at(memory, w.mul(which, copied * width)) for which in (odd, w.sub(1, odd)))
        many = w.minimum(w.sub(count, i), BLOCK)

        def find(r: ir.Value) -> None:
            later = w.minimum(w.add(i, w.add(r, BLOCK)), w.sub(count, 1))
            row = loops.row(w, x, tokens, later, words=width)
            w.b.store(w.b.ptrtoint(row, I64), w.at(next_rows, r, I64))

        def columns(neuron: Index, lanes: list[int]) -> None:
            def put(r: ir.Value, panel: int, sums: ir.Value) -> None:
                present = sums if lanes[panel] == ROWS else w.shuffle(sums, range(lanes[panel]))
                finish(present, w.add(i, r), w.add(neuron, panel * ROWS))

            def beside(step: ir.Value) -> None:
                own = w.minimum(w.mul(w.div(neuron, BLOCK), own_rows), BLOCK)
                for r in (w.add(own, further) for further in range(own_rows)):
                    row = w.b.inttoptr(w.integer(w.at(next_rows, r, I64), I64), POINTER)
                    copy(row, r, w.mul(step, ROWS), others)

            right = Words(w.at(packed, w.mul(neuron, width)), ROWS * width)
            rows, steps = Words(ours, width), width // ROWS
            blocks.multiply(rows, right, steps, many, put, len(lanes), beside=beside)

        w.each(copied, find)
        w.range(0, whole, BLOCK, lambda neuron: columns(neuron, [ROWS, ROWS]))
        if rest:
            columns(whole, rest)

    w.each(w.minimum(count, BLOCK), first)
    w.range(0, count, BLOCK, block)


def scatter_by_amx(loops: Loops, w: Writer) -> None:
    """Add an expert's part to its tokens' rows."""
    count, tokens, y, weights, z = w.arguments
    blocks, width, words = Blocks(loops, w), loops.packing.scatter_words, loops.words_I
    memory = w.scratch(BLOCK * width)
    if width > words:
        w.range(0, BLOCK * width, ROWS, lambda word: w.store(w.zero(), w.at(memory, word)))

    def copy(own: ir.Value, r: ir.Value) -> None:
        def part(word: ir.Value, lanes: int) -> None:
            place = w.at(memory, w.add(w.mul(r, width), word))
            w.store(w.load(w.at(own, w.add(w.mul(r, words), word)), w.vector_of(lanes)), place)

        w.tiles(words, loops.tails, part)

    def block(i: ir.Value) -> None:
        many, own = w.minimum(w.sub(count, i), BLOCK), w.at(z, w.mul(i, words))
        # Values stand side by side. They are copied to be filled up: to whole words, or where other rows follow none.
        as_they_are = w.compare(many, "==", BLOCK) if width == words else I1(0)
        with w.b.if_then(w.b.not_(as_they_are)):
            w.each(many, lambda r: copy(own, r))
        rows = Words(w.b.select(as_they_are, own, memory), width)

        def columns(d: ir.Value) -> None:
            def place(r: ir.Value) -> ir.Value:
                return w.at(loops.row(w, y, tokens, w.add(i, r), words=loops.D), d)

            def add(r: ir.Value, panel: int, sums: ir.Value) -> None:
                address = w.at(place(r), panel * ROWS)
                w.store(w.b.fadd(w.load(address), sums), address)

            right = Words(w.at(weights, w.mul(d, width)), ROWS * width)
            w.each(many, lambda r: w.prefetch(place(r), 2))
            blocks.multiply(rows, right, width // ROWS, many, add)

        w.range(0, loops.D, BLOCK, columns)

    w.range(0, count, BLOCK, block)
    w.b.ret_void()
