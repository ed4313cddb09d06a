"""The functions that `compiled.py` calls, compiled for one layer's sizes.

    choose   norms, scores of the router, the K highest, for each expert the set of tokens that chose it: one task
    read     h_t = relu(up_e · x_t + b)                  a task is an expert
             gated: relu(gate_e · x_t + c) ⊙ (up_e · x_t + b), rows of `up` only for neurons whose gate is open
    write    y_t = c + Σ_{h_ti ≠ 0} h_ti · down_i        a task is a range of columns

These are three stages, or one task for one thread. Where the ids are known, nothing is scored. A row of weights is
prefetched while the one before it is multiplied.

Shapes: T tokens, D d_model, E experts, I neurons per expert, F = E·I, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from llvmlite import ir

from switchable.compute.cpu.decode.norm import NormKind, write_norm
from switchable.compute.cpu.decode.rows import Rows
from switchable.compute.cpu.llvm import I64, POINTER, Machine, Values, Writer, i64
from switchable.compute.cpu.tasks import Record, Tasks
from switchable.compute.cpu.topk import write_selection

AHEAD = 3
"""Rows of `down` between the one added and the one prefetched."""
ROWS = (4, 2, 1)
"""Rows of weights that are multiplied with a token side by side."""
MORE = max(AHEAD, ROWS[0])
"""Places after a list of neurons, whose rows may be prefetched."""
DECODE = Tasks(
    numbers=("tokens",),
    addresses=(
        "x", "norm", "norm_bias", "normed", "router", "router_bias", "scores", "ids", "token_sets", "gate",
        "gate_scale", "gate_bias", "up", "up_scale", "bias", "hidden", "down", "down_scale", "start", "add", "y",
    ),
    stages=3,
)  # fmt: skip
"""`normed` [T, D], `scores` [T, E], `token_sets` [E + 1] (who chose each expert, a bit each; E: none), `hidden` [T, F]
are scratch; so is `ids` [T, K] where the router chooses. `start` [D] and `add` [T, D] are what y begins with. A scale
[F] belongs to weights of 8 bits."""


class Sizes(NamedTuple):  # a tuple: it is made and hashed in every call that is not kept
    """What code is compiled for."""

    d_model: int
    neurons: int
    experts: int
    chosen: int
    squared: bool
    gated: bool
    gate_bias: bool
    bias: bool
    alone: bool
    """Whether all is one task."""
    mass: float = 1.0
    start: bool = False
    routed: bool = False
    """Whether a router chooses; else the ids are given."""
    adds: bool = False
    """Whether every token has something of its own that is added, as the input of a residual branch."""
    dtype: torch.dtype = torch.float32
    """Of the matrices."""
    norm: NormKind | None = None
    """Of what comes in, if any."""
    router_dtype: torch.dtype = torch.float32
    bias_dtype: torch.dtype = torch.float32

    @property
    def d_ff(self) -> int:
        return self.experts * self.neurons


class DecodeKernels:
    """Writes the function "decode", into which the parts below go, and those that it calls."""

    def __init__(self, module: ir.Module, sizes: Sizes, machine: Machine):
        self.module, self.sizes, self.lanes = module, sizes, machine.vector_bytes // 4
        self.w = w = Writer(module, "decode", [POINTER], wide=False, lanes=self.lanes)
        self.blocks = [
            machine.registers // 2 >> half for half in range((machine.registers // 2).bit_length())
        ]
        self.x = "x" if sizes.norm is None else "normed"
        self.rows, self.router, self.biases = (
            Rows(dtype, sizes.d_model, self.lanes)
            for dtype in (sizes.dtype, sizes.router_dtype, sizes.bias_dtype)
        )
        if sizes.routed:
            self.scores = self._write_dots(
                "scores", self.router, sizes.experts, self.router, lambda _w, total, _place: total
            )
        entrance, factor = (self.biases if has else None for has in (sizes.gate_bias, sizes.bias))
        entrance = entrance if sizes.gated else factor
        self.hidden = self._write_dots("hidden", self.rows, sizes.neurons, entrance, self._activation)
        if sizes.gated:
            self.factors = self._write_dots(
                "factors",
                self.rows,
                None,
                factor,
                lambda w, total, place: w.b.fmul(total, w.load(place, total.type)),
            )
        if sizes.alone:
            DECODE.write(w, self._all)
        else:
            DECODE.write(w, self._choose, self._read, self._write)

    def _all(self, record: Record, task: ir.Value) -> None:
        self._choose(record, task)
        self.w.each(self.sizes.experts, lambda e: self._read(record, e))
        self._columns(record, i64(0), i64(self.sizes.d_model // self.lanes))

    def _choose(self, record: Record, _: ir.Value) -> None:
        if self.sizes.norm is not None:
            given = [record[name] for name in ("x", "norm", "norm_bias")]
            write_norm(self.w, self.sizes.norm, record["tokens"], given, record["normed"], self.sizes.d_model)
        if self.sizes.routed:
            self._route(record)
        self._gather(record)

    def _activation(self, w: Writer, totals: ir.Value, _place: ir.Value) -> ir.Value:
        zero = w.zero(totals.type)
        totals = w.b.select(w.b.fcmp_ordered("<", totals, zero), zero, totals)
        return w.b.fmul(totals, totals) if self.sizes.squared else totals

    def _write_dots(
        self,
        name: str,
        kind: Rows,
        count: int | None,
        biases: Rows | None,
        finish: Callable[[Writer, ir.Value, ir.Value], ir.Value],
    ) -> ir.Function:
        """out_r = finish(matrix_r · x + bias_r, where it goes) for so many rows of a matrix; None: for those listed."""
        listing = [POINTER, I64] if count is None else []
        w = Writer(self.module, f"{name}_dots", [*[POINTER] * 5, *listing], wide=False, lanes=self.lanes)
        (matrix, scale, bias, x, out, *listed), width = w.arguments, self.sizes.d_model

        def tile(r: ir.Value, rows: int) -> None:
            def number(row: int) -> ir.Value:
                return w.integer(w.at(listed[0], w.add(r, row), I64), I64) if listed else w.add(r, row)

            numbers = [number(row) for row in range(2 * rows)]
            addresses = [kind.at(w, matrix, w.mul(place, width)) for place in numbers]
            # What is prefetched is the next tile's, while this one is multiplied.
            (sums,) = kind.dots(w, addresses[:rows], addresses[rows:], [x], width)
            # Of rows that are no neighbours each is finished by itself.
            for place, some in zip(numbers, [[each] for each in sums] if listed else [sums], strict=False):
                totals, goes_to = w.reduce_each(some), w.at(out, place)
                if kind.scaled:
                    totals = w.b.fmul(totals, w.load(w.at(scale, place), totals.type))
                if biases is not None:
                    own = biases.at(w, bias, place)
                    totals = w.b.fadd(totals, biases.load(w, own, totals.type.count))
                w.store(finish(w, totals, goes_to), goes_to)

        w.tiles(listed[1] if count is None else count, ROWS, tile)
        w.b.ret_void()
        return w.function

    def _route(self, record: Record) -> None:
        w, experts, chosen = self.w, self.sizes.experts, self.sizes.chosen

        def token(t: ir.Value) -> None:
            scores = w.at(record["scores"], w.mul(t, experts))
            x = w.at(record[self.x], w.mul(t, self.sizes.d_model))
            w.b.call(self.scores, [record["router"], scores, record["router_bias"], x, scores])
            ids = w.at(record["ids"], w.mul(t, chosen), I64)
            write_selection(w, scores, ids, experts, chosen, self.sizes.mass)

        w.each(record["tokens"], token)

    def _gather(self, record: Record) -> None:
        """Fill `token_sets`."""
        w, b = self.w, self.w.b
        w.each(self.sizes.experts, lambda e: b.store(i64(0), w.at(record["token_sets"], e, I64)))

        def token(t: ir.Value) -> None:
            bit, first = b.shl(i64(1), t), w.mul(t, self.sizes.chosen)

            def pair(k: ir.Value) -> None:
                expert = w.integer(w.at(record["ids"], w.add(first, k), I64), I64)
                place = w.at(record["token_sets"], expert, I64)
                b.store(b.or_(w.integer(place, I64), bit), place)

            w.each(self.sizes.chosen, pair)

        w.each(record["tokens"], token)

    def _each_token(self, record: Record, e: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """body(token) for those that chose an expert."""
        w, b, f = self.w, self.w.b, self.w.function
        left = w.integer(w.at(record["token_sets"], e, I64), I64)
        before = b.block
        head, work, after = (f.append_basic_block(name) for name in ("left", "token", "none"))
        b.branch(head)
        b.position_at_end(head)
        tokens = b.phi(I64)
        tokens.add_incoming(left, before)
        b.cbranch(w.compare(tokens, "==", 0), after, work)
        b.position_at_end(work)
        body(b.cttz(tokens, ir.Constant(ir.IntType(1), 1)))
        tokens.add_incoming(b.and_(tokens, w.sub(tokens, 1)), b.block)
        b.branch(head)
        b.position_at_end(after)

    def _read(self, record: Record, e: ir.Value) -> None:
        """Fill `hidden` for one expert."""
        w, sizes = self.w, self.sizes
        neuron = w.mul(e, sizes.neurons)
        names = ("gate", "gate_scale", "gate_bias") if sizes.gated else ("up", "up_scale", "bias")
        matrix, scale, bias = (record[name] for name in names)
        entrance = self.rows.at(w, matrix, w.mul(neuron, sizes.d_model))
        own = [w.at(scale, neuron), self.biases.at(w, bias, neuron)]

        def token(t: ir.Value) -> None:
            x = w.at(record[self.x], w.mul(t, sizes.d_model))
            hidden = w.at(record["hidden"], w.mul(t, sizes.d_ff))
            w.b.call(self.hidden, [entrance, *own, x, w.at(hidden, neuron)])
            if sizes.gated:
                numbers, _, count = self._firing(record, e, t)
                others = [record[name] for name in ("up", "up_scale", "bias")]
                w.b.call(self.factors, [*others, x, hidden, numbers, count])

        self._each_token(record, e, token)

    def _write(self, record: Record, task: ir.Value) -> None:
        w = self.w
        first, after = w.share(i64(self.sizes.d_model // self.lanes), task, record["tasks2"])
        self._columns(record, w.mul(first, self.lanes), w.sub(after, first))

    def _columns(self, record: Record, first: ir.Value, vectors: ir.Value) -> None:
        """Write some columns of y."""
        w, sizes = self.w, self.sizes

        def row(field: str, number: ir.Value) -> ir.Value:
            return w.at(record[field], w.add(w.mul(number, sizes.d_model), first))

        def down(number: ir.Value, place: ir.Value) -> ir.Value:
            index = w.add(w.add(w.mul(number, sizes.d_model), first), place)
            return self.rows.at(w, record["down"], index)

        def begin(t: ir.Value) -> None:
            def copy(v: ir.Value) -> None:
                place = w.mul(v, self.lanes)
                start = self.biases.at(w, record["start"], w.add(first, place))
                value = self.biases.load(w, start) if sizes.start else w.zero()
                if sizes.adds:
                    value = w.b.fadd(value, w.load(w.at(row("add", t), place)))
                w.store(value, w.at(row("y", t), place))

            w.each(vectors, copy)

        w.each(record["tokens"], begin)

        def token(e: ir.Value, t: ir.Value) -> None:
            numbers, values, count = self._firing(record, e, t)

            def block(v: ir.Value, size: int) -> None:
                place = w.mul(v, self.lanes)
                own = w.at(row("y", t), place)

                def add(i: ir.Value, sums: Values) -> Values:
                    value = w.load_broadcast(w.at(values, i))
                    ahead = w.integer(w.at(numbers, w.add(i, AHEAD), I64), I64)
                    self.rows.prefetch(w, down(ahead, place), size)
                    number = w.integer(w.at(numbers, i, I64), I64)
                    if self.rows.scaled:
                        value = w.b.fmul(value, w.load_broadcast(w.at(record["down_scale"], number)))
                    columns = self.rows.vectors(w, down(number, place), size)
                    return [w.fma(value, column, total) for column, total in zip(columns, sums, strict=True)]

                _, sums = w.loop(0, count, 1, w.vectors(own, size), add)
                w.store_vectors(sums, own)

            w.tiles(vectors, self.blocks, block)

        w.each(sizes.experts, lambda e: self._each_token(record, e, lambda t: token(e, t)))

    def _firing(self, record: Record, e: ir.Value, t: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """List an expert's neurons that are not zero for a token: numbers (then MORE of the first), values, count."""
        w, b, first = self.w, self.w.b, self.w.mul(e, self.sizes.neurons)
        numbers, values = w.scratch(self.sizes.neurons + MORE, I64), w.scratch(self.sizes.neurons)
        hidden = w.at(record["hidden"], w.add(w.mul(t, self.sizes.d_ff), first))

        def neuron(j: ir.Value, count: Values) -> Values:
            value = w.load(w.at(hidden, j), w.number)
            # No branch to guess: a neuron that is zero is overwritten by the next one. A NaN is not zero.
            b.store(w.add(first, j), w.at(numbers, count[0], I64))
            w.store(value, w.at(values, count[0]))
            return [w.add(count[0], b.zext(b.fcmp_unordered("!=", value, w.zero(w.number)), I64))]

        _, (count,) = w.loop(0, self.sizes.neurons, 1, [i64(0)], neuron)
        for k in range(MORE):
            b.store(first, w.at(numbers, w.add(count, k), I64))
        return numbers, values, count
