"""`weights` by AMX: neurons' values times tokens' rows, which are paired up once for all neurons (`amx_products.py`).

Shapes as in `kernels.py`.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.amx import ROWS
from switchable.compute.cpu.experts.amx_products import BLOCK, Blocks, Kept, Words
from switchable.compute.cpu.experts.kernels import AHEAD, Loops
from switchable.compute.cpu.experts.reorder import transpose
from switchable.compute.cpu.llvm import I32, I64, POINTER, Index, Writer, i64


def weights_by_amx(loops: Loops, w: Writer) -> None:
    """Add the products of tokens to some columns of their expert's gradient; to zero if the gradient is `new`."""
    count, _, _, _, gradient, _, words, kept, start, stop, new, last = w.arguments
    most, apart = loops.packing.gradient_tokens // 2, loops.packing.gradient_stride
    blocks, panels = Blocks(loops, w), w.at(kept, loops.packing.gradient_kept)
    steps = w.div(w.add(count, BLOCK - 1), BLOCK)

    def columns(d: ir.Value) -> None:
        own_panels = Words(w.at(panels, w.mul(w.sub(d, start), most)), ROWS * most)

        def neurons(j: ir.Value) -> None:
            at_once = w.b.and_(new, last)
            own = w.b.select(at_once, blocks.sums, w.at(kept, w.add(w.mul(j, loops.D), w.mul(d, BLOCK))))
            left, rows = Words(w.at(words, w.mul(j, apart)), apart), w.minimum(w.sub(loops.I, j), BLOCK)

            def place(r: ir.Value) -> ir.Value:
                return w.at(gradient, w.add(w.mul(w.add(j, r), loops.D), d))

            def put(r: ir.Value, panel: int, sums: ir.Value) -> None:
                w.store(sums, w.at(place(r), panel * ROWS))

            with w.b.if_then(last):
                w.each(rows, lambda r: w.prefetch(place(r), 2))
            blocks.multiply(left, own_panels, steps, rows, put, kept=Kept(own, new, last))

        w.range(0, loops.I, BLOCK, neurons)

    _gather(loops, w, panels, steps)
    w.range(start, stop, BLOCK, columns)
    w.b.ret_void()


def _gather(loops: Loops, w: Writer, panels: ir.Value, steps: ir.Value) -> None:
    """Make words of the tokens' values, and panels of their rows' columns."""
    count, places, tokens, x, _, z, words, _, start, stop, _, _ = w.arguments
    most, apart = loops.packing.gradient_tokens // 2, loops.packing.gradient_stride
    x_rows, z_rows = (w.scratch(2 * most + AHEAD, I64) for _ in range(2))
    nothing = w.scratch(-(-max(loops.words_D, loops.I) // ROWS) * ROWS)

    def find(i: ir.Value) -> None:
        """Note where a token's input and values are; what fills the last step up is zero."""
        there = w.compare(i, "<", count)
        own = w.b.select(there, i, i64(0))
        z_row = loops.at_z(w, z, w.mul(w.integer(w.at(places, own, I32)), loops.I))
        for table, row in ((x_rows, loops.row(w, x, tokens, own, words=loops.words_D)), (z_rows, z_row)):
            w.b.store(w.b.ptrtoint(w.b.select(there, row, nothing), I64), w.at(table, i, I64))

    def row(table: ir.Value, i: ir.Value) -> ir.Value:
        return w.b.inttoptr(w.integer(w.at(table, i, I64), I64), POINTER)

    def pair(table: ir.Value, i: ir.Value, first: Index, numbers: int) -> ir.Value:
        """Words of the tokens 2i and 2i + 1."""
        left, right = (loops.at_z(w, row(table, w.add(w.mul(i, 2), own)), first) for own in range(2))
        return loops.pair_up(w, left, right, numbers)

    def values(step: ir.Value, j: Index, lanes: int) -> None:
        """Transpose the values that some neurons have for 32 tokens."""
        table = [pair(z_rows, w.add(w.mul(step, ROWS), r), j, lanes) for r in range(ROWS)]
        full = [w.shuffle(words, [min(lane, lanes - 1) for lane in range(ROWS)]) for words in table]
        for r, line in enumerate(transpose(w, full, 1)):
            w.store(line, w.at(words, w.add(w.mul(w.add(j, r), apart), w.mul(step, ROWS))))

    def step_values(step: ir.Value) -> None:
        whole = loops.I // ROWS * ROWS
        w.range(0, whole, ROWS, lambda j: values(step, j, ROWS))
        if whole < loops.I:
            values(step, whole, loops.I - whole)

    def inputs(i: ir.Value) -> None:
        """Pair up two tokens' rows: read at once, as they may come from far away."""

        def part(d: ir.Value) -> None:
            for own in range(2):
                w.prefetch(loops.at_z(w, row(x_rows, w.add(w.mul(i, 2), own + AHEAD)), d), 1)
            both = pair(x_rows, i, d, BLOCK)
            for panel in range(2):
                half = w.shuffle(both, range(panel * ROWS, (panel + 1) * ROWS))
                place = w.mul(w.add(w.sub(d, start), panel * ROWS), most)
                w.store(half, w.at(panels, w.add(place, w.mul(i, ROWS))))

        w.range(start, stop, BLOCK, part)

    w.range(0, max(loops.words_D, loops.I), ROWS, lambda word: w.store(w.zero(), w.at(nothing, word)))
    w.each(w.add(w.mul(steps, BLOCK), AHEAD), find)
    w.each(w.mul(steps, ROWS), inputs)
    w.each(steps, step_values)
