"""The loops of `fused`: products of an expert's tokens that read and write the tokens' rows where they lie.

    dot      z_p = epilogue(Wₑ · x_t)       for every sorted pair p = (token t, expert e); Wₑ is [I, D]
    scatter  y_t = Σ Wₑᵀ · z_p              over the pairs of a token
    weights  Gₑ = Σ z_p x_tᵀ                over the pairs of an expert: the gradient of Wₑ
    bias     gₑ = Σ z_p

A product keeps a tile of results in registers, for instance 8 tokens by 3 vectors of neurons, and walks through what
is summed over; a token's row is found through its index, so no row is ever copied. A matrix product library cannot do
that, and wants more than some 30 neurons per expert besides; these loops reach two thirds of the processor's rate from
8 neurons on. What is added to (y, G) is asked for from memory one tile ahead.

Tokens are taken in chunks whose rows stay in the core's own cache while all experts are applied to them. Every sum is
made in the order of experts or of tokens, whatever the chunks and threads: results do not depend on them in any bit.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, P = T·K sorted pairs, C chunks,
L lanes of a vector.
"""

from __future__ import annotations

import itertools

from llvmlite import ir

from switchable.ffn.experts.fused_packing import Packing
from switchable.ffn.experts.fused_reorder import write_reorder
from switchable.ffn.experts.fused_sort import segment
from switchable.ffn.experts.llvm import I32, I64, POINTER, Values, Writer, smaller, whole
from switchable.ffn.experts.tasks import Record, Tasks

AHEAD = 8
"""Most rows between the one worked on and the one asked for from memory: so many places after the last one are read."""
EPILOGUES = ("", "_relu", "_bias_relu", "_mask", "_slope")
"""What `dot` does to its results: nothing; rectify them; add a bias and rectify; set to zero where the activation is
not positive (the derivative of ReLU); times twice the activation (of its square)."""
PAIRS = ("tokens", "starts")
DOT = Tasks(("experts",), (*PAIRS, "x", "weights", "packed", "z", "bias", "act"), stages=2)
"""Tasks are experts, whose `weights` are reordered into `packed`, and then chunks; `z` [P, I] is written, `bias` is
[F], `act` [P, I]."""
SCATTER = Tasks(("experts", "per_chunk", "token_count"), (*PAIRS, "y", "weights", "z"))
"""A task is a chunk; `y` [T, D] is written."""
WEIGHTS = Tasks(("experts", "chunks"), (*PAIRS, "x", "gradient", "z"))
"""A task is a range of columns; `gradient` [F, D] is written."""
BIAS = Tasks(("experts", "chunks"), (*PAIRS, "gradient", "z"))
"""A task is an expert; `gradient` [F] is added to."""


class Kernels:
    """Writes the loops for one packing into a module."""

    def __init__(self, module: ir.Module, packing: Packing):
        self.module, self.packing = module, packing
        self.D, self.I, self.L = packing.d_model, packing.neurons, packing.lanes
        self.reorder = self._writer("reorder_expert", [POINTER, POINTER])
        write_reorder(self.reorder, packing)
        for epilogue in EPILOGUES:
            self._write_dot(epilogue)
        self._write_scatter()
        self._write_weights()
        self._write_bias()

    def _writer(self, name: str, arguments: list[ir.Type]) -> Writer:
        return Writer(self.module, name, arguments, wide=self.packing.wide, lanes=self.L)

    def _write_dot(self, epilogue: str) -> None:
        product = self._writer(
            f"dot{epilogue}_expert", [I64, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER]
        )
        # One vector per token leaves too few sums to keep the multipliers busy: take two steps at a time.
        for first, vectors in _groups(self.packing.vectors, 3):
            self._dot(
                product, epilogue, first, vectors, 2 if vectors == 1 and self.packing.steps % 2 == 0 else 1
            )
        product.b.ret_void()
        w = self._writer(f"dot{epilogue}", [POINTER])
        own = self.packing.vectors * self.packing.steps * self.L

        def reorder(record: Record, e: ir.Value) -> None:
            weights = w.at(record["weights"], w.b.mul(e, whole(self.I * self.D)))
            w.b.call(self.reorder.function, [weights, w.at(record["packed"], w.b.mul(e, whole(own)))])

        def chunk(record: Record, number: ir.Value) -> None:
            def expert(e: ir.Value) -> None:
                first, count = segment(w, record, number, e)
                pair = w.b.mul(first, whole(self.I))
                arguments = [
                    count,
                    w.at(record["tokens"], first, I32),
                    record["x"],
                    w.at(record["packed"], w.b.mul(e, whole(own))),
                    w.at(record["z"], pair),
                    w.at(record["bias"], w.b.mul(e, whole(self.I))),
                    w.at(record["act"], pair),
                ]
                w.b.call(product.function, arguments)

            w.each(record["experts"], expert)

        DOT.write(w, reorder, chunk)

    def _dot(self, w: Writer, epilogue: str, first: int, vectors: int, chains: int) -> None:
        """Products of an expert's tokens with some of its vectors of neurons, tile by tile."""
        count, tokens, x, packed, z, bias, act = w.arguments
        p, steps = self.packing.together, self.packing.steps

        def tile(i: ir.Value, rows: int) -> None:
            addresses = [self._row(w, x, tokens, i, r) for r in range(rows)]

            def step(d: ir.Value, carried: Values) -> Values:
                sums = list(carried)
                for chain in range(chains):
                    at = w.b.add(d, whole(chain))
                    place = w.b.mul(at, whole(self.L))
                    columns = [
                        w.load(w.at(packed, w.b.add(place, whole(v * steps * self.L))))
                        for v in range(first, first + vectors)
                    ]
                    for r, address in enumerate(addresses):
                        numbers = w.repeated(w.at(address, w.b.mul(at, whole(p))), p)
                        for v, column in enumerate(columns):
                            which = (chain * rows + r) * vectors + v
                            sums[which] = w.multiply_add(numbers, column, sums[which])
                return sums

            zeros = [w.zero()] * (chains * rows * vectors)
            _, sums = w.loop(whole(0), whole(steps), whole(chains), zeros, step)
            for r in range(rows):
                for v in range(vectors):
                    parts = sums[r * vectors + v :: rows * vectors]
                    total = parts[0] if chains == 1 else w.b.fadd(*parts)
                    neuron = (first + v) * self.packing.neurons_per_vector
                    pair = w.b.add(w.b.mul(w.b.add(i, whole(r)), whole(self.I)), whole(neuron))
                    total = self._fold(w, total, min(self.packing.neurons_per_vector, self.I - neuron))
                    total = _finish(w, total, epilogue, w.at(bias, whole(neuron)), w.at(act, pair))
                    w.store(total, w.at(z, pair))

        w.tiles(count, self.packing.tile_rows, tile)

    def _fold(self, w: Writer, total: ir.Value, neurons: int) -> ir.Value:
        """Add up the p partial sums of each neuron, and drop the lanes after the last one."""
        for lanes in range(self.packing.together.bit_length() - 1):
            half = self.L >> (lanes + 1)
            even, odd = (w.shuffled(total, range(first, 2 * half, 2)) for first in (0, 1))
            total = w.b.fadd(even, odd)
        return total if neurons == total.type.count else w.shuffled(total, range(neurons))

    def _row(self, w: Writer, x: ir.Value, tokens: ir.Value, i: ir.Value, further: int = 0) -> ir.Value:
        """The address of the row of an expert's token number i + further."""
        token = w.integer(w.at(tokens, w.b.add(i, whole(further)), I32))
        return w.at(x, w.b.mul(token, whole(self.D)))

    def _write_scatter(self) -> None:
        product = self._writer("scatter_expert", [I64, POINTER, POINTER, POINTER, POINTER])
        self._scatter(product)
        w = self._writer("scatter", [POINTER])

        def chunk(record: Record, number: ir.Value) -> None:
            b, begin = w.b, w.b.mul(number, record["per_chunk"])
            own = w.at(record["y"], b.mul(begin, whole(self.D)))
            count = smaller(w, record["per_chunk"], b.sub(record["token_count"], begin))
            vectors = b.mul(count, whole(self.D // self.L))
            w.each(vectors, lambda i: w.store(w.zero(), w.at(own, b.mul(i, whole(self.L)))))

            def expert(e: ir.Value) -> None:
                first, count = segment(w, record, number, e)
                tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], b.mul(first, whole(self.I)))
                weights = w.at(record["weights"], b.mul(e, whole(self.I * self.D)))
                b.call(product.function, [count, tokens, record["y"], weights, z])

            w.each(record["experts"], expert)

        SCATTER.write(w, chunk)

    def _scatter(self, w: Writer) -> None:
        """Add an expert's part to its tokens' rows, block of columns by block of columns."""
        count, tokens, y, weights, z = w.arguments
        vectors = self.packing.scatter_columns

        def block(d: ir.Value, _: Values) -> Values:
            def tile(i: ir.Value, rows: int) -> None:
                for r in range(rows):
                    w.prefetch(w.at(self._row(w, y, tokens, i, rows + r), d), vectors)
                own = w.at(z, w.b.mul(i, whole(self.I)))

                def step(j: ir.Value, carried: Values) -> Values:
                    sums = list(carried)
                    columns = w.vectors(w.at(weights, w.b.add(w.b.mul(j, whole(self.D)), d)), vectors)
                    for r in range(rows):
                        value = w.repeated(w.at(own, w.b.add(j, whole(r * self.I))))
                        for v, column in enumerate(columns):
                            sums[r * vectors + v] = w.multiply_add(value, column, sums[r * vectors + v])
                    return sums

                _, sums = w.loop(whole(0), whole(self.I), whole(1), [w.zero()] * (rows * vectors), step)
                for r in range(rows):
                    row = w.at(self._row(w, y, tokens, i, r), d)
                    for v in range(vectors):
                        place = w.at(row, whole(v * self.L))
                        w.store(w.b.fadd(w.load(place), sums[r * vectors + v]), place)

            w.tiles(count, self.packing.scatter_rows, tile)
            return []

        w.loop(whole(0), whole(self.D), whole(vectors * self.L), [], block)
        w.b.ret_void()

    def _write_weights(self) -> None:
        product = self._writer("weights_expert", [I64, POINTER, POINTER, POINTER, POINTER, I64, I64])
        self._weights(product)
        w, width = self._writer("weights", [POINTER]), self.packing.gradient_columns * self.L

        def columns(record: Record, number: ir.Value) -> None:
            b, blocks = w.b, whole(self.D // width)
            bounds = [
                b.mul(b.sdiv(b.mul(blocks, end), record["tasks"]), whole(width))
                for end in (number, b.add(number, whole(1)))
            ]

            def expert(chunk: ir.Value, e: ir.Value) -> None:
                first, count = segment(w, record, chunk, e)
                tokens, z = w.at(record["tokens"], first, I32), w.at(record["z"], b.mul(first, whole(self.I)))
                gradient = w.at(record["gradient"], b.mul(e, whole(self.I * self.D)))
                with b.if_then(b.icmp_signed("==", chunk, whole(0))):
                    w.each(whole(self.I), lambda j: clear(w.at(gradient, b.mul(j, whole(self.D)))))
                b.call(product.function, [count, tokens, record["x"], gradient, z, *bounds])

            def clear(row: ir.Value) -> None:
                def store(d: ir.Value, _: Values) -> Values:
                    w.store(w.zero(), w.at(row, d))
                    return []

                w.loop(bounds[0], bounds[1], whole(self.L), [], store)

            w.each(record["chunks"], lambda c: w.each(record["experts"], lambda e: expert(c, e)))

        WEIGHTS.write(w, columns)

    def _weights(self, w: Writer) -> None:
        """Add the products of an expert's tokens to some columns of its gradient."""
        count, tokens, x, gradient, z, start, stop = w.arguments
        vectors = self.packing.gradient_columns

        def block(d: ir.Value, _: Values) -> Values:
            def tile(j: ir.Value, neurons: int, *, first: bool = False) -> None:
                def row(r: int) -> ir.Value:
                    return w.at(gradient, w.b.add(w.b.mul(w.b.add(j, whole(r)), whole(self.D)), d))

                def step(i: ir.Value, carried: Values) -> Values:
                    sums = list(carried)
                    if first:  # later tiles find the tokens in the cache
                        w.prefetch(w.at(self._row(w, x, tokens, i, AHEAD), d), vectors)
                    inputs = w.vectors(w.at(self._row(w, x, tokens, i), d), vectors)
                    own = w.at(z, w.b.add(w.b.mul(i, whole(self.I)), j))
                    for r in range(neurons):
                        value = w.repeated(w.at(own, whole(r)))
                        for v in range(vectors):
                            sums[r * vectors + v] = w.multiply_add(value, inputs[v], sums[r * vectors + v])
                    return sums

                for r in range(neurons):
                    w.prefetch(row(neurons + r), vectors)
                before = [vector for r in range(neurons) for vector in w.vectors(row(r), vectors)]
                _, sums = w.loop(whole(0), count, whole(1), before, step)
                for r in range(neurons):
                    for v in range(vectors):
                        w.store(sums[r * vectors + v], w.at(row(r), whole(v * self.L)))

            sizes = self.packing.gradient_rows
            rows = next(rows for rows in sizes if rows <= self.I)
            tile(whole(0), rows, first=True)
            w.tiles(whole(self.I), sizes, tile, start=rows)
            return []

        w.loop(start, stop, whole(vectors * self.L), [], block)
        w.b.ret_void()

    def _write_bias(self) -> None:
        w = self._writer("bias", [POINTER])

        def expert(record: Record, chunk: ir.Value, e: ir.Value) -> None:
            first, count = segment(w, record, chunk, e)

            def tile(j: ir.Value, lanes: int) -> None:
                kind = w.vector_of(lanes)
                total = w.at(record["gradient"], w.b.add(w.b.mul(e, whole(self.I)), j))

                def step(i: ir.Value, carried: Values) -> Values:
                    pair = w.b.add(w.b.mul(w.b.add(first, i), whole(self.I)), j)
                    return [w.b.fadd(carried[0], w.load(w.at(record["z"], pair), kind))]

                _, (result,) = w.loop(whole(0), count, whole(1), [w.load(total, kind)], step)
                w.store(result, total)

            w.tiles(whole(self.I), [self.L >> half for half in range(self.L.bit_length())], tile)

        BIAS.write(w, lambda record, e: w.each(record["chunks"], lambda c: expert(record, c, e)))


def _finish(w: Writer, total: ir.Value, epilogue: str, bias: ir.Value, act: ir.Value) -> ir.Value:
    kind = total.type
    if "bias" in epilogue:
        total = w.b.fadd(total, w.load(bias, kind))
    if "relu" in epilogue:  # a NaN stays one, here and below
        total = w.b.select(w.b.fcmp_ordered("<", total, w.zero(kind)), w.zero(kind), total)
    if "mask" in epilogue:
        total = w.b.select(w.b.fcmp_unordered(">", w.load(act, kind), w.zero(kind)), total, w.zero(kind))
    if "slope" in epilogue:
        value = w.load(act, kind)
        total = w.b.fmul(total, w.b.fadd(value, value))
    return total


def _groups(vectors: int, most: int) -> list[tuple[int, int]]:
    """Cut a number of vectors into groups of at most `most`, as equal as possible: (first, how many)."""
    count = -(-vectors // most)
    bounds = [vectors * i // count for i in range(count + 1)]
    return [(first, after - first) for first, after in itertools.pairwise(bounds)]
