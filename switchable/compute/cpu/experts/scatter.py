"""`scatter`: adding up what a token's experts contribute to its row.

A block of an expert's columns, or of a large expert's some rows of one, meets all its tokens, six of them at a time.
The rows lie a whole d_model apart, which first-level caches take badly (they hold few lines at such distances), so the
first tile leaves them side by side for the others, and asks for what is next; every tile asks for some of the next
expert's values.

Shapes as in `fused_kernels.py`.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.experts.kernels import PAIRS, Loops, Share
from switchable.compute.cpu.experts.sort import segment
from switchable.compute.cpu.llvm import I32, I64, POINTER, Values, Writer, smaller, whole
from switchable.compute.cpu.tasks import Record, Tasks

SCATTER = Tasks(("experts", "per_chunk", "token_count"), (*PAIRS, "y", "weights", "z"))
"""A task is a chunk; `y` [T, D] is written."""


def write_scatter(loops: Loops) -> None:
    """Write the function "scatter"."""
    product = loops.writer("scatter_expert", [I64, *[POINTER] * 4])
    _product(loops, product)
    w = loops.writer("scatter", [POINTER])

    def chunk(record: Record, number: ir.Value) -> None:
        b, begin = w.b, w.b.mul(number, record["per_chunk"])
        own = w.at(record["y"], b.mul(begin, whole(loops.D)))
        count = smaller(w, record["per_chunk"], b.sub(record["token_count"], begin))
        vectors = b.mul(count, whole(loops.D // loops.L))
        w.each(vectors, lambda i: w.store(w.zero(), w.at(own, b.mul(i, whole(loops.L)))))

        def expert(e: ir.Value) -> None:
            first, count = segment(w, record, number, e)
            tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], b.mul(first, whole(loops.I)))
            weights = w.at(record["weights"], b.mul(e, whole(loops.I * loops.D)))
            b.call(product.function, [count, tokens, record["y"], weights, z])

        w.each(record["experts"], expert)

    SCATTER.write(w, chunk)


def _product(loops: Loops, w: Writer) -> None:
    """Add an expert's part to its tokens' rows, block of columns by block of columns and piece by piece of it."""
    b, packing, count = w.b, loops.packing, w.arguments[0]
    width, pieces = packing.scatter_columns * loops.L, max(1, packing.scatter_pieces)
    side_by_side = w.scratch(-(-loops.I // pieces) * width) if packing.scatter_pieces else None

    def block(d: ir.Value, _: Values) -> Values:
        def piece(number: ir.Value) -> None:
            rows = [
                b.sdiv(b.mul(whole(loops.I), n), whole(pieces)) for n in (number, b.add(number, whole(1)))
            ]
            done = b.add(b.mul(b.sdiv(d, whole(width)), whole(pieces)), number)
            _piece(loops, w, d, rows, b.mul(done, count), side_by_side)

        w.each(whole(pieces), piece)
        return []

    w.loop(whole(0), whole(loops.D), whole(width), [], block)
    b.ret_void()


def _piece(
    loops: Loops, w: Writer, d: ir.Value, rows: Values, steps_before: ir.Value, side_by_side: ir.Value | None
) -> None:
    """Some rows of an expert's part, in some columns."""
    count, tokens, y, weights, z = w.arguments
    b, packing, (low, high) = w.b, loops.packing, rows
    vectors, sizes = packing.scatter_columns, packing.scatter_rows
    width, most = vectors * loops.L, sizes[0]
    pieces = max(1, packing.scatter_pieces) * loops.D // width  # of the whole expert
    following_z = w.at(z, b.mul(count, whole(loops.I)))
    share = Share(w, loops.I, whole(pieces))
    # From a row of this piece to that of the next: of the same columns, or the first one of others.
    after = b.add(d, whole(width))
    others = b.select(b.icmp_signed(">=", after, whole(loops.D)), whole(loops.I * loops.D), after)
    following = b.select(
        b.icmp_signed("==", high, whole(loops.I)),
        b.sub(others, b.mul(low, whole(loops.D))),
        b.add(d, b.mul(b.sub(high, low), whole(loops.D))),
    )

    def columns(j: ir.Value, how: str) -> list[ir.Value]:
        row = w.at(weights, b.mul(j, whole(loops.D)))
        if side_by_side is None or how == "in place":
            return w.vectors(w.at(row, d), vectors)
        place = w.at(side_by_side, b.mul(b.sub(j, low), whole(width)))
        if how == "copied":
            return w.vectors(place, vectors)
        w.prefetch(w.at(row, following), vectors)
        found = w.vectors(w.at(row, d), vectors)
        w.store_vectors(found, place)
        return found

    def tile(i: ir.Value, size: int, how: str = "in place") -> None:
        for r in range(size):
            w.prefetch(w.at(loops.row(w, y, tokens, i, size + r), d), vectors)
        lines = -(-most * loops.I // (pieces * loops.L))
        w.prefetch(w.at(following_z, share(b.add(steps_before, i))), lines, near=False)
        own = w.at(z, b.mul(i, whole(loops.I)))

        def step(j: ir.Value, carried: Values) -> Values:
            sums, found = list(carried), columns(j, how)
            for r in range(size):
                value = w.repeated(w.at(own, b.add(j, whole(r * loops.I))))
                for v, column in enumerate(found):
                    sums[r * vectors + v] = w.multiply_add(value, column, sums[r * vectors + v])
            return sums

        _, sums = w.loop(low, high, whole(1), [w.zero()] * (size * vectors), step)
        for r in range(size):
            row = w.at(loops.row(w, y, tokens, i, r), d)
            there = w.vectors(row, vectors)
            w.store_vectors([b.fadd(old, sums[r * vectors + v]) for v, old in enumerate(there)], row)

    if side_by_side is None:
        w.tiles(count, sizes, tile)
        return
    with b.if_else(b.icmp_signed(">=", count, whole(most))) as (many, few):
        with many:
            tile(whole(0), most, "copying")
            w.tiles(count, sizes, lambda i, size: tile(i, size, "copied"), start=most)
        with few:
            w.tiles(count, sizes[1:], tile)
