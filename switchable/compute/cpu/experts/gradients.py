"""`weights` and `bias`: the gradients, sums over an expert's tokens.

A block of columns of an expert's gradient is made in tiles of some neurons, each a walk through the tokens. Their rows
lie a whole d_model apart or more, which first-level caches take badly, so the first tile leaves the block's columns
side by side for the others, for some tokens at a time, and asks for the values of the next expert bit by bit.

Shapes as in `fused_kernels.py`.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.experts.kernels import AHEAD, PAIRS, Loops, Share
from switchable.compute.cpu.experts.sort import segment
from switchable.compute.cpu.llvm import I1, I32, I64, POINTER, Values, Writer, whole
from switchable.compute.cpu.tasks import Record, Tasks

WEIGHTS = Tasks(("experts", "chunks"), (*PAIRS, "x", "gradient", "z"))
"""A task is a range of columns; `gradient` [F, D] is written."""
BIAS = Tasks(("experts", "chunks"), (*PAIRS, "gradient", "z"))
"""A task is an expert; `gradient` [F] is added to."""
MOST_TOKENS = 128
"""Whose columns stand side by side, 256 bytes each: they should stay in the first-level cache."""


def write_weights(loops: Loops) -> None:
    """Write the function "weights"."""
    product = loops.writer("weights_expert", [I64, *[POINTER] * 4, I64, I64, I1])
    _in_parts(loops, product)
    w, width = loops.writer("weights", [POINTER]), loops.packing.gradient_columns * loops.L

    def columns(record: Record, number: ir.Value) -> None:
        b, blocks = w.b, whole(loops.D // width)
        bounds = [
            b.mul(b.sdiv(b.mul(blocks, end), record["tasks"]), whole(width))
            for end in (number, b.add(number, whole(1)))
        ]

        def expert(chunk: ir.Value, e: ir.Value) -> None:
            first, count = segment(w, record, chunk, e)
            tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], b.mul(first, whole(loops.I)))
            gradient = w.at(record["gradient"], b.mul(e, whole(loops.I * loops.D)))
            new = b.icmp_signed("==", chunk, whole(0))
            b.call(product.function, [count, tokens, record["x"], gradient, z, *bounds, new])

        w.each(record["chunks"], lambda c: w.each(record["experts"], lambda e: expert(c, e)))

    WEIGHTS.write(w, columns)


def _in_parts(loops: Loops, w: Writer) -> None:
    """Add the products of an expert's tokens to some columns of its gradient; to nothing if it is `new`."""
    count, tokens, x, gradient, z, start, stop, new = w.arguments
    b, width = w.b, loops.packing.gradient_columns * loops.L
    side_by_side = w.scratch(MOST_TOKENS * width)
    needed = b.sdiv(b.add(count, whole(MOST_TOKENS - 1)), whole(MOST_TOKENS))
    # One at least: a new gradient of no token is zero.
    parts = b.select(b.icmp_signed("<", needed, whole(1)), whole(1), needed)

    def part(number: ir.Value) -> None:
        low, high = (b.sdiv(b.mul(count, n), parts) for n in (number, b.add(number, whole(1))))
        own_tokens, own_z = w.at(tokens, low, I32), w.at(z, b.mul(low, whole(loops.I)))
        from_zero = b.and_(new, b.icmp_signed("==", number, whole(0)))
        _product(
            loops, w, (b.sub(high, low), own_tokens, x, gradient, own_z, start, stop), from_zero, side_by_side
        )

    w.each(parts, part)
    b.ret_void()


def _product(loops: Loops, w: Writer, operands: Values, from_zero: ir.Value, side_by_side: ir.Value) -> None:
    count, tokens, x, gradient, z, start, stop = operands
    b, vectors, sizes = w.b, loops.packing.gradient_columns, loops.packing.gradient_rows
    width, first_rows = vectors * loops.L, next(rows for rows in sizes if rows <= loops.I)
    following_z = w.at(z, b.mul(count, whole(loops.I)))
    share = Share(w, loops.I, b.sdiv(b.sub(stop, start), whole(width)))

    def block(d: ir.Value, _: Values) -> Values:
        steps_before = b.mul(b.sdiv(b.sub(d, start), whole(width)), count)

        def inputs(i: ir.Value, first: bool) -> list[ir.Value]:
            place = w.at(side_by_side, b.mul(i, whole(width)))
            if not first:
                return w.vectors(place, vectors)
            w.prefetch(w.at(loops.row(w, x, tokens, i, AHEAD), d), vectors)
            w.prefetch(w.at(following_z, share(b.add(steps_before, i))), 1, near=False)
            found = w.vectors(w.at(loops.row(w, x, tokens, i), d), vectors)
            if first_rows < loops.I:  # there are others
                w.store_vectors(found, place)
            return found

        def tile(j: ir.Value, neurons: int, *, first: bool = False) -> None:
            def row(r: int) -> ir.Value:
                return w.at(gradient, b.add(b.mul(b.add(j, whole(r)), whole(loops.D)), d))

            def step(i: ir.Value, carried: Values) -> Values:
                sums, found = list(carried), inputs(i, first)
                own = w.at(z, b.add(b.mul(i, whole(loops.I)), j))
                for r in range(neurons):
                    value = w.repeated(w.at(own, whole(r)))
                    for v in range(vectors):
                        sums[r * vectors + v] = w.multiply_add(value, found[v], sums[r * vectors + v])
                return sums

            for r in range(neurons):
                w.prefetch(row(neurons + r), vectors)
            before = [vector for r in range(neurons) for vector in w.vectors(row(r), vectors)]
            begin = [b.select(from_zero, w.zero(), vector) for vector in before]
            _, sums = w.loop(whole(0), count, whole(1), begin, step)
            for r in range(neurons):
                w.store_vectors(sums[r * vectors : (r + 1) * vectors], row(r))

        tile(whole(0), first_rows, first=True)
        w.tiles(whole(loops.I), sizes, tile, start=first_rows)
        return []

    w.loop(start, stop, whole(width), [], block)


def write_bias(loops: Loops) -> None:
    """Write the function "bias"."""
    w = loops.writer("bias", [POINTER])

    def expert(record: Record, chunk: ir.Value, e: ir.Value) -> None:
        first, count = segment(w, record, chunk, e)

        def tile(j: ir.Value, lanes: int) -> None:
            kind = w.vector_of(lanes)
            total = w.at(record["gradient"], w.b.add(w.b.mul(e, whole(loops.I)), j))

            def step(i: ir.Value, carried: Values) -> Values:
                pair = w.b.add(w.b.mul(w.b.add(first, i), whole(loops.I)), j)
                return [w.b.fadd(carried[0], w.load(w.at(record["z"], pair), kind))]

            _, (result,) = w.loop(whole(0), count, whole(1), [w.load(total, kind)], step)
            w.store(result, total)

        w.tiles(whole(loops.I), [loops.L >> half for half in range(loops.L.bit_length())], tile)

    BIAS.write(w, lambda record, e: w.each(record["chunks"], lambda c: expert(record, c, e)))
