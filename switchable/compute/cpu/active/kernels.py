"""The loops of `active`: products with a matrix of activations of which few are not zero.

    sum        y_t = Σ s_e · W_i                over the entries of a token
    dot        z_e = W_i · x_t                  for every entry
    weights    G_i = Σ s_e · x_t                over the entries of a neuron
    totals     g_i = Σ s_e
    mass       m_tg = Σ s_e · n_i               over a token's entries whose neuron is in group g

A product keeps a row of results in registers and walks through its entries; the rows that it reads come from the
core's own cache, since tokens are taken in chunks and neurons in blocks. Every sum is made in the order of neurons or
of tokens, whatever chunks, blocks and threads: results do not depend on them in any bit.

Rows of weights, x and dy may be bfloat16. Then `dot` multiplies them in pairs, and the sums multiply by float32 what a
row's words hold: the same number of rows passes the cache as in float32, in half the bytes. Entries' values and all
sums are float32.

How entries stand in memory, and the shapes: `entries.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from switchable.compute.cpu.active.entries import (
    ENTRIES,
    SIZES,
    NeuronPlace,
    Place,
    each_neuron,
    each_token,
    write_collect,
    write_transpose,
)
from switchable.compute.cpu.experts.kernels import Loops
from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import I32, I64, Values, Writer
from switchable.compute.cpu.tasks import Record, Tasks

SUM = Tasks(SIZES, (*ENTRIES, "weights", "y"))
"""Reads `weights` [F, D], writes `y` [T, D]. A task is a chunk."""
DOT = Tasks(SIZES, (*ENTRIES, "weights", "x"))
"""Reads `weights` [F, D] and `x` [T, D], writes `values` [A]. A task is a chunk."""
WEIGHTS = Tasks(("chunks", "neuron_count"), ("base", "firsts", "order", "tokens", "values", "x", "gradient"))
"""Reads `x` [T, D], adds to `gradient` [F, D]. A task is a range of neurons."""
TOTALS = Tasks(("chunks", "neuron_count"), ("base", "firsts", "order", "tokens", "values", "gradient"))
"""Adds to `gradient` [F]. A task is a range of neurons."""
MASS = Tasks((*SIZES, "groups"), (*ENTRIES, "norms", "mass"))
"""Reads `norms` [F], writes `mass` [T, G]. A task is a chunk."""


class ActiveKernels(Loops):
    """Writes loops for one width into a module: `write[name]()`.

    Args:
        module: gets the functions.
        packing: of experts of one neuron each, whose rows are whole vectors of words.
    """

    def __init__(self, module: ir.Module, packing: Packing):
        super().__init__(module, packing)
        most, vectors = packing.machine.registers // 2 // packing.terms, self.words_D // self.L
        self.word_columns = max(v for v in range(1, most + 1) if vectors % v == 0)
        """Vectors of words of a row that stay in registers, as float32 twice as many where words are pairs."""
        self.write = {
            "collect": lambda: write_collect(self.writer("collect"), paired=self.paired),
            "transpose": lambda: write_transpose(self.writer("transpose")),
            "sum": self._write_sum,
            "dot": self._write_dot,
            "weights": self._write_weights,
            "totals": self._write_totals,
            "mass": self._write_mass,
        }

    def _write_sum(self) -> None:
        w = self.writer("sum")

        def token(record: Record, place: Place) -> None:
            def entry(e: ir.Value) -> tuple[ir.Value, ir.Value]:
                return w.at(place.values, e), self._row(w, record["weights"], place.neurons, e)

            own = w.at(record["y"], w.mul(place.token, self.D))
            self._add_rows(w, own, place.begin, place.end, entry, new=w.compare(place.block, "==", 0))

        SUM.write(w, lambda record, chunk: each_token(w, record, chunk, token))

    def _write_dot(self) -> None:
        w = self.writer("dot")
        b = w.b

        def token(record: Record, place: Place) -> None:
            x = w.at(record["x"], w.mul(place.token, self.words_D))

            def entries(first: ir.Value, count: int) -> None:
                rows = [self._row(w, record["weights"], place.neurons, w.add(first, r)) for r in range(count)]
                chains = 2 if self.word_columns % 2 == 0 else 1

                def columns(d: ir.Value, carried: Values) -> Values:
                    sums = list(carried)
                    inputs = w.vectors(w.at(x, d), self.word_columns)
                    for r, row in enumerate(rows):
                        for v, weight in enumerate(w.vectors(w.at(row, d), self.word_columns)):
                            which = r * chains + v % chains
                            sums[which] = self.multiply_add(w, inputs[v], weight, sums[which])
                    return sums

                zeros = [w.zero()] * (count * chains)
                _, sums = w.loop(0, self.words_D, self.word_columns * self.L, zeros, columns)
                for r in range(count):
                    parts = sums[r * chains : (r + 1) * chains]
                    total = parts[0] if chains == 1 else b.fadd(*parts)
                    b.store(w.reduce_add(total), w.at(place.values, w.add(first, r)))

            count = w.sub(place.end, place.begin)
            w.tiles(count, (4, 1), lambda i, size: entries(w.add(place.begin, i), size))

        DOT.write(w, lambda record, chunk: each_token(w, record, chunk, token))

    def _write_weights(self) -> None:
        w = self.writer("weights")

        def neuron(record: Record, place: NeuronPlace) -> None:
            def entry(p: ir.Value) -> tuple[ir.Value, ir.Value]:
                value = w.at(place.values, w.integer(w.at(place.order, p, I32)))
                return value, self._row(w, record["x"], place.tokens, p)

            own = w.at(record["gradient"], w.mul(place.neuron, self.D))
            self._add_rows(w, own, place.begin, place.end, entry)

        WEIGHTS.write(w, lambda record, number: each_neuron(w, record, number, neuron))

    def _write_totals(self) -> None:
        w = self.writer("totals")
        b = w.b

        def neuron(record: Record, place: NeuronPlace) -> None:
            own = w.at(record["gradient"], place.neuron)

            def entry(p: ir.Value, carried: Values) -> Values:
                value = w.at(place.values, w.integer(w.at(place.order, p, I32)))
                return [b.fadd(carried[0], b.load(value, typ=w.number))]

            _, (total,) = w.loop(place.begin, place.end, 1, [b.load(own, typ=w.number)], entry)
            b.store(total, own)

        TOTALS.write(w, lambda record, number: each_neuron(w, record, number, neuron))

    def _write_mass(self) -> None:
        w = self.writer("mass")
        b = w.b

        def token(record: Record, place: Place) -> None:
            groups = record["groups"]
            own = w.at(record["mass"], w.mul(place.token, groups))
            size = b.trunc(w.div(record["neuron_count"], groups), I32)
            with b.if_then(w.compare(place.block, "==", 0)):
                w.each(groups, lambda g: b.store(ir.Constant(w.number, 0.0), w.at(own, g)))

            def entry(e: ir.Value) -> None:
                neuron = b.load(w.at(place.neurons, e, I32), typ=I32)
                group = w.at(own, b.zext(b.udiv(neuron, size), I64))
                norm = b.load(w.at(record["norms"], b.zext(neuron, I64)), typ=w.number)
                value = b.load(w.at(place.values, e), typ=w.number)
                b.store(b.fadd(b.load(group, typ=w.number), b.fmul(value, norm)), group)

            w.range(place.begin, place.end, 1, entry)

        MASS.write(w, lambda record, chunk: each_token(w, record, chunk, token))

    def _add_rows(
        self,
        w: Writer,
        own: ir.Value,
        begin: ir.Value,
        end: ir.Value,
        entry: Callable[[ir.Value], tuple[ir.Value, ir.Value]],
        new: ir.Value | None = None,
    ) -> None:
        """own += Σ value · row over the places `begin` to `end`; own = Σ value · row where it is `new`.

        `entry` returns a place's addresses of value and row. Some columns at a time stay in registers.
        """

        terms = self.packing.terms

        def columns(d: ir.Value) -> None:
            place = w.at(own, w.mul(d, terms))
            sums: Values = w.vectors(place, self.word_columns * terms)
            sums = self._apart(w, sums) if self.paired else sums
            if new is not None:
                sums = [w.b.select(new, w.zero(), vector) for vector in sums]

            def add(p: ir.Value, sums: Values) -> Values:
                value, row = entry(p)
                factor, vectors = w.load_broadcast(value), self._numbers(w, w.at(row, d))
                return [w.fma(factor, vector, total) for vector, total in zip(vectors, sums, strict=True)]

            sums = w.loop(begin, end, 1, sums, add)[1]
            w.store_vectors(self._together(w, sums) if self.paired else sums, place)

        w.range(0, self.words_D, self.word_columns * self.L, columns)

    def _numbers(self, w: Writer, words: ir.Value) -> Values:
        """Read columns of a row; of pairs, the first numbers and the second ones of each vector by turns."""
        vectors = w.vectors(words, self.word_columns)
        if not self.paired:
            return vectors
        whole = ir.VectorType(I32, self.L)
        low, high = (ir.Constant(whole, [bits] * self.L) for bits in (16, 0xFFFF0000))
        found = []
        for vector in vectors:
            pair = w.b.bitcast(vector, whole)
            # A bfloat16 is the upper half of a float32.
            found += [w.b.bitcast(half, w.vector) for half in (w.b.shl(pair, low), w.b.and_(pair, high))]
        return found

    def _apart(self, w: Writer, vectors: Values) -> Values:
        """Neighbouring columns in the order of `_numbers`."""
        both = zip(vectors[::2], vectors[1::2], strict=True)
        return [w.shuffle(a, range(side, 2 * self.L, 2), b) for a, b in both for side in (0, 1)]

    def _together(self, w: Writer, vectors: Values) -> Values:
        """The columns of `_apart` as they stand in memory."""
        lanes = [lane + side * self.L for lane in range(self.L) for side in (0, 1)]
        both = zip(vectors[::2], vectors[1::2], strict=True)
        return [w.shuffle(a, half, b) for a, b in both for half in (lanes[: self.L], lanes[self.L :])]

    def _row(self, w: Writer, rows: ir.Value, numbers: ir.Value, place: ir.Value) -> ir.Value:
        """The address of the row whose number stands in a place."""
        return w.at(rows, w.mul(w.integer(w.at(numbers, place, I32)), self.words_D))
