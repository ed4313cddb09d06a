"""`weights` and `bias`: the gradients, sums over an expert's tokens, Gₑ = Σ z_p x_tᵀ and gₑ = Σ z_p.

A block of columns of an expert's gradient is made in tiles of some neurons, each a walk through the tokens. The
tokens' rows lie a whole d_model apart or more, which first-level caches take badly. So the first tile copies their
columns side by side for the other tiles, for some tokens at a time, and prefetches the values of the next expert.

Shapes as in `kernels.py`.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.experts.kernels import AHEAD, PAIRS, Loops, Pace
from switchable.compute.cpu.experts.sort import segment
from switchable.compute.cpu.llvm import I1, I32, I64, POINTER, Values, Writer, i64
from switchable.compute.cpu.tasks import Record, Tasks

WEIGHTS = Tasks(("experts", "chunks"), (*PAIRS, "x", "gradient", "z"))
"""A task is a range of columns; `gradient` [F, D] is written."""
BIAS = Tasks(("experts", "chunks"), (*PAIRS, "gradient", "z"))
"""A task is an expert; `gradient` [F] is added to."""
MOST_TOKENS = 128
"""Whose columns are copied at a time, 256 bytes each: they should stay in the first-level cache."""


def write_weights(loops: Loops) -> None:
    """Write the function "weights"."""
    product = loops.writer("weights_expert", [I64, *[POINTER] * 4, I64, I64, I1])
    _in_parts(loops, product)
    w, width = loops.writer("weights", [POINTER]), loops.packing.gradient_columns * loops.L

    def columns(record: Record, number: ir.Value) -> None:
        bounds = [w.mul(end, width) for end in w.share(loops.D // width, number, record["tasks"])]

        def expert(chunk: ir.Value, e: ir.Value) -> None:
            first, count = segment(w, record, chunk, e)
            tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], w.mul(first, loops.I))
            gradient = w.at(record["gradient"], w.mul(e, loops.I * loops.D))
            new = w.compare(chunk, "==", 0)
            w.b.call(product.function, [count, tokens, record["x"], gradient, z, *bounds, new])

        w.each(record["chunks"], lambda c: w.each(record["experts"], lambda e: expert(c, e)))

    WEIGHTS.write(w, columns)


def _in_parts(loops: Loops, w: Writer) -> None:
    """Add the products of an expert's tokens to some columns of its gradient; to zero if the gradient is `new`."""
    count, tokens, x, gradient, z, start, stop, new = w.arguments
    b, width = w.b, loops.packing.gradient_columns * loops.L
    copies = w.scratch(MOST_TOKENS * width)
    needed = w.div(w.add(count, MOST_TOKENS - 1), MOST_TOKENS)
    # One at least: a new gradient of no token is zero.
    parts = b.select(w.compare(needed, "<", 1), i64(1), needed)

    def part(number: ir.Value) -> None:
        low, high = w.share(count, number, parts)
        own_tokens, own_z = w.at(tokens, low, I32), w.at(z, w.mul(low, loops.I))
        from_zero = b.and_(new, w.compare(number, "==", 0))
        operands = (w.sub(high, low), own_tokens, x, gradient, own_z, start, stop)
        _product(loops, w, operands, from_zero, copies)

    w.each(parts, part)
    b.ret_void()


def _product(loops: Loops, w: Writer, operands: Values, from_zero: ir.Value, copies: ir.Value) -> None:
    """Add the products of some of an expert's tokens, `MOST_TOKENS` at most, to the columns `start` to `stop`."""
    count, tokens, x, gradient, z, start, stop = operands
    b, vectors, sizes = w.b, loops.packing.gradient_columns, loops.packing.gradient_rows
    width, first_rows = vectors * loops.L, next(rows for rows in sizes if rows <= loops.I)
    following_z = w.at(z, w.mul(count, loops.I))
    pace = Pace(w, loops.I, w.div(w.sub(stop, start), width))

    def block(d: ir.Value) -> None:
        steps_before = w.mul(w.div(w.sub(d, start), width), count)

        def inputs(i: ir.Value, first: bool) -> list[ir.Value]:
            place = w.at(copies, w.mul(i, width))
            if not first:
                return w.vectors(place, vectors)
            w.prefetch(w.at(loops.row(w, x, tokens, i, AHEAD), d), vectors)
            w.prefetch(w.at(following_z, pace(w.add(steps_before, i))), 1, near=False)
            found = w.vectors(w.at(loops.row(w, x, tokens, i), d), vectors)
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
                        sums[r * vectors + v] = w.fma(value, found[v], sums[r * vectors + v])
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
    w = loops.writer("bias", [POINTER])

    def expert(record: Record, chunk: ir.Value, e: ir.Value) -> None:
        first, count = segment(w, record, chunk, e)

        def tile(j: ir.Value, lanes: int) -> None:
            kind = w.vector_of(lanes)
            total = w.at(record["gradient"], w.add(w.mul(e, loops.I), j))

            def step(i: ir.Value, carried: Values) -> Values:
                pair = w.add(w.mul(w.add(first, i), loops.I), j)
                return [w.b.fadd(carried[0], w.load(w.at(record["z"], pair), kind))]

            _, (result,) = w.loop(0, count, 1, [w.load(total, kind)], step)
            w.store(result, total)

        w.tiles(loops.I, [loops.L >> half for half in range(loops.L.bit_length())], tile)

    BIAS.write(w, lambda record, e: w.each(record["chunks"], lambda c: expert(record, c, e)))
