"""`scatter`: adding up what a token's experts contribute to its row, y_t = Σ Wₑᵀ · z_p.

A block of an expert's columns meets all its tokens, six of them at a time. (Of a large expert only some rows do, one
piece after the other, so that the block stays in the first-level cache.)

The rows of a block lie a whole d_model apart, which first-level caches take badly: they hold few lines at such
distances. So the first tile of tokens copies them side by side for the other tiles, in bfloat16 as words, and
prefetches the rows that come next; every tile prefetches a part of the next expert's values.

Shapes as in `kernels.py`.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.experts.amx_products import scatter_by_amx
from switchable.compute.cpu.experts.kernels import PAIRS, Loops, Pace
from switchable.compute.cpu.experts.sort import segment
from switchable.compute.cpu.llvm import I32, I64, POINTER, Values, Writer, i64
from switchable.compute.cpu.tasks import Record, Stage, Tasks

SCATTER = Tasks(
    ("experts", "per_chunk", "token_count", "adds"), (*PAIRS, "y", "weights", "packed", "z"), stages=2
)
"""Tasks are experts, whose `weights` become panels in `packed` (for AMX, else none), and then chunks; `y` [T, D] is
written, in float32 or float64, or added to if `adds` is 1."""


def write_scatter(loops: Loops) -> None:
    """Write the function "scatter"."""
    w = loops.writer("scatter")
    pack, chunk = scatter_stages(loops, w)
    SCATTER.write(w, pack, loops.task(w, chunk))


def scatter_stages(loops: Loops, w: Writer) -> tuple[Stage, Stage]:
    """Return what a task of each stage does."""
    product = loops.writer("scatter_expert", [I64, *[POINTER] * 4])
    (scatter_by_amx if loops.amx else _product)(loops, product)
    own_words = loops.packing.scatter_words * loops.D

    def of_expert(record: Record, e: ir.Value) -> ir.Value:
        return loops.at_z(w, record["weights"], w.mul(e, loops.I * loops.D))

    def chunk(record: Record, number: ir.Value) -> None:
        begin = w.mul(number, record["per_chunk"])
        own = w.at(record["y"], w.mul(begin, loops.D))
        count = w.minimum(record["per_chunk"], w.sub(record["token_count"], begin))
        vectors = w.mul(count, loops.D // loops.L)
        with w.b.if_then(w.compare(record["adds"], "==", 0)):
            w.each(vectors, lambda i: w.store(w.zero(), w.at(own, w.mul(i, loops.L))))

        def expert(e: ir.Value) -> None:
            first, count = segment(w, record, number, e)
            tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], w.mul(first, loops.words_I))
            weights = w.at(record["packed"], w.mul(e, own_words)) if loops.amx else of_expert(record, e)
            w.b.call(product.function, [count, tokens, record["y"], weights, z])

        w.each(record["experts"], expert)

    def pack(record: Record, e: ir.Value) -> None:
        packed, width = w.at(record["packed"], w.mul(e, own_words)), loops.packing.scatter_words

        def put(words: ir.Value, j: ir.Value, d: ir.Value) -> None:
            w.store(words, w.at(packed, w.add(w.mul(j, loops.L), w.mul(d, width))))

        def row(j: ir.Value) -> None:
            def vector(d: ir.Value) -> None:
                first = loops.at_z(w, of_expert(record, e), w.add(w.mul(j, 2 * loops.D), d))
                put(loops.pair_up(w, first, loops.at_z(w, first, loops.D), loops.L), j, d)

            w.range(0, loops.D, loops.L, vector)

        def no_row(j: ir.Value) -> None:
            w.range(0, loops.D, loops.L, lambda d: put(w.zero(), j, d))

        if loops.amx:
            w.each(loops.words_I, row)
            w.range(loops.words_I, width, 1, no_row)

    return pack, chunk


def _product(loops: Loops, w: Writer) -> None:
    """Add an expert's part to its tokens' rows, block of columns by block of columns and piece by piece of it."""
    packing, count = loops.packing, w.arguments[0]
    width, pieces = packing.scatter_columns * loops.L, packing.scatter_pieces
    copies = w.scratch(-(-loops.words_I // pieces) * width)

    def block(d: ir.Value) -> None:
        def piece(number: ir.Value) -> None:
            rows = w.share(loops.words_I, number, pieces)
            pieces_before = w.add(w.mul(w.div(d, width), pieces), number)
            _piece(loops, w, d, rows, w.mul(pieces_before, count), copies)

        w.each(pieces, piece)

    w.range(0, loops.D, width, block)
    w.b.ret_void()


def _piece(
    loops: Loops, w: Writer, d: ir.Value, rows: Values, steps_before: ir.Value, copies: ir.Value
) -> None:
    """Rows low to high of an expert, in the columns from d on, times all its tokens' values."""
    count, tokens, y, weights, z = w.arguments
    b, packing, (low, high) = w.b, loops.packing, rows
    vectors, sizes = packing.scatter_columns, packing.scatter_rows
    width, most, terms = vectors * loops.L, sizes[0], packing.terms
    pieces = packing.scatter_pieces * loops.D // width  # of the whole expert
    following_z = w.at(z, w.mul(count, loops.words_I))
    pace = Pace(w, loops.words_I, pieces)
    # From a row of this piece to the row that the next piece has in its place. The next piece holds further rows of
    # the same columns, after the last rows the first ones of the next columns, after the last columns the next expert.
    next_columns = w.add(d, width)
    jump = b.select(w.compare(next_columns, ">=", loops.D), i64(loops.I * loops.D), next_columns)
    following = b.select(
        w.compare(high, "==", loops.words_I),
        w.sub(jump, w.mul(low, terms * loops.D)),
        w.add(d, w.mul(w.sub(high, low), terms * loops.D)),
    )

    def columns(j: ir.Value, source: str) -> list[ir.Value]:
        place = w.at(copies, w.mul(w.sub(j, low), width))
        if source == "copies":
            return w.vectors(place, vectors)
        starts = [w.mul(w.add(w.mul(j, terms), term), loops.D) for term in range(terms)]
        rows = [loops.at_z(w, weights, w.add(start, d)) for start in starts]
        found = loops.words(w, rows, vectors)
        if source != "weights":
            for start in starts:
                w.prefetch(loops.at_z(w, weights, w.add(start, following)), -(-vectors // terms))
            w.store_vectors(found, place)
        return found

    def tile(i: ir.Value, size: int, source: str = "weights") -> None:
        for r in range(size):
            w.prefetch(w.at(loops.row(w, y, tokens, i, size + r, words=loops.D), d), vectors)
        lines = -(-most * loops.words_I // (pieces * loops.L))
        w.prefetch(w.at(following_z, pace(w.add(steps_before, i))), lines, near=False)
        own = w.at(z, w.mul(i, loops.words_I))

        def step(j: ir.Value, carried: Values) -> Values:
            sums, found = list(carried), columns(j, source)
            for r in range(size):
                value = w.load_broadcast(w.at(own, w.add(j, r * loops.words_I)))
                for v, column in enumerate(found):
                    sums[r * vectors + v] = loops.multiply_add(w, value, column, sums[r * vectors + v])
            return sums

        _, sums = w.loop(low, high, 1, [w.zero()] * (size * vectors), step)
        for r in range(size):
            row = w.at(loops.row(w, y, tokens, i, r, words=loops.D), d)
            before = w.vectors(row, vectors)
            w.store_vectors([b.fadd(old, sums[r * vectors + v]) for v, old in enumerate(before)], row)

    with b.if_else(w.compare(count, ">=", most)) as (several_tiles, one_tile):
        with several_tiles:
            tile(i64(0), most, "weights, which are copied")
            w.tiles(count, sizes, lambda i, size: tile(i, size, "copies"), start=most)
        with one_tile:  # copies would not be read again
            w.tiles(count, sizes[1:], tile)
