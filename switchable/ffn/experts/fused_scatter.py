"""`scatter`: adding up what a token's experts contribute to its row.

A block of an expert's columns meets all its tokens, six of them at a time. Its rows lie a whole d_model apart, which
first-level caches take badly (they hold few lines at such distances), so the first tile leaves them side by side for
the others, and asks for those of the next block; every tile asks for some of the next expert's values.

Shapes as in `fused_kernels.py`.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.ffn.experts.fused_kernels import PAIRS, Loops, Share
from switchable.ffn.experts.fused_sort import segment
from switchable.ffn.experts.llvm import I32, I64, POINTER, Values, Writer, smaller, whole
from switchable.ffn.experts.tasks import Record, Tasks

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
    """Add an expert's part to its tokens' rows, block of columns by block of columns."""
    count, tokens, y, weights, z = w.arguments
    packing, vectors, sizes = loops.packing, loops.packing.scatter_columns, loops.packing.scatter_rows
    width, most = vectors * loops.L, sizes[0]
    side_by_side = w.scratch(loops.I * width) if packing.scatter_copies else None
    blocks = loops.D // width
    following_z = w.at(z, w.b.mul(count, whole(loops.I)))
    share = Share(w, loops.I, whole(blocks))
    lines = -(-most * loops.I // (blocks * loops.L))

    def block(d: ir.Value, _: Values) -> Values:
        after = w.b.add(d, whole(width))
        last = w.b.icmp_signed(">=", after, whole(loops.D))
        following = w.b.select(last, whole(loops.I * loops.D), after)
        before = w.b.mul(w.b.sdiv(d, whole(width)), count)

        def columns(j: ir.Value, how: str) -> list[ir.Value]:
            row = w.b.mul(j, whole(loops.D))
            place = None if side_by_side is None else w.at(side_by_side, w.b.mul(j, whole(width)))
            if how == "copied":
                return w.vectors(place, vectors)
            found = w.vectors(w.at(weights, w.b.add(row, d)), vectors)
            if how == "copying":
                w.prefetch(w.at(weights, w.b.add(row, following)), vectors)
                w.store_vectors(found, place)
            return found

        def tile(i: ir.Value, rows: int, how: str = "in place") -> None:
            for r in range(rows):
                w.prefetch(w.at(loops.row(w, y, tokens, i, rows + r), d), vectors)
            w.prefetch(w.at(following_z, share(w.b.add(before, i))), lines, near=False)
            own = w.at(z, w.b.mul(i, whole(loops.I)))

            def step(j: ir.Value, carried: Values) -> Values:
                sums, found = list(carried), columns(j, how)
                for r in range(rows):
                    value = w.repeated(w.at(own, w.b.add(j, whole(r * loops.I))))
                    for v, column in enumerate(found):
                        sums[r * vectors + v] = w.multiply_add(value, column, sums[r * vectors + v])
                return sums

            _, sums = w.loop(whole(0), whole(loops.I), whole(1), [w.zero()] * (rows * vectors), step)
            for r in range(rows):
                row = w.at(loops.row(w, y, tokens, i, r), d)
                there = w.vectors(row, vectors)
                w.store_vectors([w.b.fadd(old, sums[r * vectors + v]) for v, old in enumerate(there)], row)

        if side_by_side is None:
            w.tiles(count, sizes, tile)
            return []
        with w.b.if_else(w.b.icmp_signed(">=", count, whole(most))) as (many, few):
            with many:
                tile(whole(0), most, "copying")
                w.tiles(count, sizes, lambda i, rows: tile(i, rows, "copied"), start=most)
            with few:
                w.tiles(count, sizes[1:], tile)
        return []

    w.loop(whole(0), whole(loops.D), whole(width), [], block)
    w.b.ret_void()
