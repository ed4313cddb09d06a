"""`weights` and `bias`: the gradients, sums over an expert's tokens, Gₑ = Σ z_p x_tᵀ and gₑ = Σ z_p.

A block of columns of an expert's gradient is made in tiles of some neurons, each a walk through the tokens. The
tokens' rows lie a whole d_model apart or more, which first-level caches take badly. So the first tile copies their
columns side by side for the other tiles, for some tokens at a time, and prefetches the values of the next expert.

In bfloat16 a word holds numbers of two tokens. Which two must not depend on chunks, so an expert's tokens are
collected from all of them, and their values are paired up once for all columns.

Shapes as in `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from switchable.compute.cpu.experts.amx_gradient import weights_by_amx
from switchable.compute.cpu.experts.kernels import AHEAD, PAIRS, Loops, Pace
from switchable.compute.cpu.experts.sort import segment
from switchable.compute.cpu.llvm import I1, I32, I64, POINTER, Values, Writer, i64
from switchable.compute.cpu.tasks import Record, Tasks

WEIGHTS = Tasks(("experts", "chunks"), (*PAIRS, "x", "gradient", "z", "words", "sums"))
"""A task is a range of columns; `gradient` [F, D] is written, in float32 or float64. Of `words` every task has
`gradient_words` for itself, in bfloat16, and of `sums` `gradient_sums`, for AMX."""
BIAS = Tasks(("experts", "chunks"), (*PAIRS, "gradient", "z"))
"""A task is an expert; `gradient` [F] is added to."""


def write_weights(loops: Loops) -> None:
    """Write the function "weights"."""
    addresses, flags = (7, 2) if loops.amx else (6, 1) if loops.paired else (4, 1)
    product = loops.writer("weights_expert", [I64, *[POINTER] * addresses, I64, I64, *[I1] * flags])
    w = loops.writer("weights")
    if loops.paired:
        (weights_by_amx if loops.amx else _of_pairs)(loops, product)
        WEIGHTS.write(w, loops.task(w, partial(_collect, loops, w, product.function)))
        return
    _in_parts(loops, product)

    def columns(record: Record, number: ir.Value) -> None:
        bounds = _bounds(loops, w, record, number)

        def expert(chunk: ir.Value, e: ir.Value) -> None:
            first, count = segment(w, record, chunk, e)
            tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], w.mul(first, loops.I))
            gradient = w.at(record["gradient"], w.mul(e, loops.I * loops.D))
            new = w.compare(chunk, "==", 0)
            w.b.call(product.function, [count, tokens, record["x"], gradient, z, *bounds, new])

        w.each(record["chunks"], lambda c: w.each(record["experts"], lambda e: expert(c, e)))

    WEIGHTS.write(w, columns)


def _bounds(loops: Loops, w: Writer, record: Record, number: ir.Value) -> Values:
    """The columns of a task."""
    width = loops.packing.gradient_columns * loops.L
    return [w.mul(end, width) for end in w.share(loops.D // width, number, record["tasks"])]


def _collect(loops: Loops, w: Writer, product: ir.Function, record: Record, number: ir.Value) -> None:
    """Multiply each expert's tokens, `gradient_tokens` at a time, wherever its chunks begin and end."""
    b, bounds, most = w.b, _bounds(loops, w, record, number), loops.packing.gradient_tokens
    places, tokens = (w.scratch(most, I32) for _ in range(2))
    sums = [w.at(record["sums"], w.mul(number, loops.packing.gradient_sums))] if loops.amx else []
    words = w.at(record["words"], w.mul(number, loops.packing.gradient_words))

    def expert(e: ir.Value) -> None:
        gradient = w.at(record["gradient"], w.mul(e, loops.I * loops.D))

        def multiply(count: ir.Value, new: ir.Value, last: int) -> None:
            operands = [count, places, tokens, record["x"], gradient, record["z"], words, *sums, *bounds, new]
            b.call(product, operands + [I1(last)] * len(sums))

        def in_chunk(chunk: ir.Value, carried: Values) -> Values:
            first, count = segment(w, record, chunk, e)

            def pair(i: ir.Value, carried: Values) -> Values:
                place, (filled, new) = w.add(first, i), carried
                w.put32(place, w.at(places, filled, I32))
                w.put32(w.integer(w.at(record["tokens"], place, I32)), w.at(tokens, filled, I32))
                full = w.compare(filled, "==", most - 1)
                with b.if_then(full):
                    multiply(i64(most), new, 0)
                return [b.select(full, i64(0), w.add(filled, 1)), b.select(full, I1(0), new)]

            return w.loop(0, count, 1, carried, pair)[1]

        _, (filled, new) = w.loop(0, record["chunks"], 1, [i64(0), I1(1)], in_chunk)
        multiply(filled, new, 1)  # of no token: a new gradient is zero

    w.each(record["experts"], expert)


def _of_pairs(loops: Loops, w: Writer) -> None:
    """Add the products of tokens to some columns of their expert's gradient; to zero if the gradient is `new`."""
    count, places, tokens, x, gradient, z, words, start, stop, new = w.arguments
    b, vectors = w.b, loops.packing.gradient_columns
    copies = w.scratch(loops.packing.gradient_tokens // 2 * vectors * loops.L)
    steps = w.div(w.add(count, 1), 2)

    def both(i: ir.Value) -> Values:
        """The two tokens of a step; the last one's second may be its first once more, with values of zero."""
        last = w.sub(count, 1)
        return [w.minimum(w.mul(i, 2), last), w.minimum(w.add(w.mul(i, 2), 1), last)]

    def pair_values(i: ir.Value) -> None:
        rows = [w.mul(w.integer(w.at(places, own, I32)), loops.I) for own in both(i)]
        single = w.compare(w.mul(w.add(i, 1), 2), ">", count)

        def tile(j: ir.Value, lanes: int) -> None:
            first, second = (loops.at_z(w, z, w.add(row, j)) for row in rows)
            w.store(loops.pair_up(w, first, second, lanes, single), w.at(words, w.add(w.mul(i, loops.I), j)))

        w.tiles(loops.I, loops.tails, tile)

    def fetch(i: ir.Value, d: ir.Value, _: ir.Value) -> Values:
        for own in both(w.add(i, AHEAD)):
            w.prefetch(column(own, d), -(-vectors // 2))
        first, second = (column(own, d) for own in both(i))
        vector = range(0, vectors * loops.L, loops.L)
        return [loops.pair_up(w, loops.at_z(w, first, v), loops.at_z(w, second, v), loops.L) for v in vector]

    def column(own: ir.Value, d: ir.Value) -> ir.Value:
        return loops.at_z(w, loops.row(w, x, tokens, own, words=loops.words_D), d)

    w.each(steps, pair_values)
    _product(loops, w, (steps, gradient, words, start, stop, new, copies), fetch)
    b.ret_void()


def _in_parts(loops: Loops, w: Writer) -> None:
    """Add the products of an expert's tokens to some columns of its gradient; to zero if the gradient is `new`."""
    count, tokens, x, gradient, z, start, stop, new = w.arguments
    b, vectors, most = w.b, loops.packing.gradient_columns, loops.packing.gradient_tokens
    width = vectors * loops.L
    copies = w.scratch(most * width)
    needed = w.div(w.add(count, most - 1), most)
    # One at least: a new gradient of no token is zero.
    parts = b.select(w.compare(needed, "<", 1), i64(1), needed)

    def part(number: ir.Value) -> None:
        low, high = w.share(count, number, parts)
        own_tokens, own_z = w.at(tokens, low, I32), w.at(z, w.mul(low, loops.I))
        many, from_zero = w.sub(high, low), b.and_(new, w.compare(number, "==", 0))
        following_z = w.at(own_z, w.mul(many, loops.I))
        pace = Pace(w, loops.I, w.div(w.sub(stop, start), width))

        def fetch(i: ir.Value, d: ir.Value, blocks_before: ir.Value) -> Values:
            w.prefetch(w.at(loops.row(w, x, own_tokens, i, AHEAD, words=loops.D), d), vectors)
            done = w.add(w.mul(blocks_before, many), i)
            w.prefetch(w.at(following_z, pace(done)), 1, near=False)
            return w.vectors(w.at(loops.row(w, x, own_tokens, i, words=loops.D), d), vectors)

        _product(loops, w, (many, gradient, own_z, start, stop, from_zero, copies), fetch)

    w.each(parts, part)
    b.ret_void()


def _product(
    loops: Loops, w: Writer, operands: Values, fetch: Callable[[ir.Value, ir.Value, ir.Value], Values]
) -> None:
    """Add some steps of an expert's sums to the columns `start` to `stop` of its gradient.

    Args:
        loops: what they are for.
        w: where to.
        operands: steps, gradient, values (I words a step), start, stop, whether to begin from zero, space for copies.
        fetch: reads a step's words of the columns from d on, prefetching others; takes the step, d, and how many
            blocks of columns are done.
    """
    count, gradient, z, start, stop, from_zero, copies = operands
    b, vectors, sizes = w.b, loops.packing.gradient_columns, loops.packing.gradient_rows
    width, first_rows = vectors * loops.L, next(rows for rows in sizes if rows <= loops.I)

    def block(d: ir.Value) -> None:
        blocks_before = w.div(w.sub(d, start), width)

        def inputs(i: ir.Value, first: bool) -> Values:
            place = w.at(copies, w.mul(i, width))
            if not first:
                return w.vectors(place, vectors)
            found = fetch(i, d, blocks_before)
            if first_rows < loops.I:  # other tiles will read them
                w.store_vectors(found, place)
            return found

        def tile(j: ir.Value, neurons: int, *, first: bool = False) -> None:
            def row(r: int) -> ir.Value:
                return w.at(gradient, w.add(w.mul(w.add(j, r), loops.D), d))

            def step(i: ir.Value, carried: Values) -> Values:
                sums, found = list(carried), inputs(i, first)
                own = w.at(z, w.add(w.mul(i, loops.I), j))
                for r in range(neurons):
                    value = w.load_broadcast(w.at(own, r))
                    for v in range(vectors):
                        which = r * vectors + v
                        sums[which] = loops.multiply_add(w, value, found[v], sums[which])
                return sums

            for r in range(neurons):
                w.prefetch(row(neurons + r), vectors)
            # New memory may hold NaNs: a select ignores them, a product with 0 would not.
            before = [vector for r in range(neurons) for vector in w.vectors(row(r), vectors)]
            begin = [b.select(from_zero, w.zero(), vector) for vector in before]
            _, sums = w.loop(0, count, 1, begin, step)
            for r in range(neurons):
                w.store_vectors(sums[r * vectors : (r + 1) * vectors], row(r))

        tile(i64(0), first_rows, first=True)
        w.tiles(loops.I, sizes, tile, start=first_rows)

    w.range(start, stop, width, block)


def write_bias(loops: Loops) -> None:
    """Write the function "bias"."""
    w = loops.writer("bias")

    def expert(record: Record, chunk: ir.Value, e: ir.Value) -> None:
        first, count = segment(w, record, chunk, e)

        def tile(j: ir.Value, lanes: int) -> None:
            kind = w.vector_of(lanes)
            total = w.at(record["gradient"], w.add(w.mul(e, loops.I), j))

            def step(i: ir.Value, carried: Values) -> Values:
                pair = w.add(w.mul(w.add(first, i), loops.I), j)
                return [w.b.fadd(carried[0], loops.load_z(w, loops.at_z(w, record["z"], pair), kind))]

            _, (result,) = w.loop(0, count, 1, [w.load(total, kind)], step)
            w.store(result, total)

        w.tiles(loops.I, loops.tails, tile)

    BIAS.write(w, lambda record, e: w.each(record["chunks"], lambda c: expert(record, c, e)))
