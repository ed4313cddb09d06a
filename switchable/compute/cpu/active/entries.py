"""The active entries of a matrix of activations: how they stand in memory, how they are found, how loops walk them.

    collect    the active entries e = (token t, neuron i, value s_e) of a dense matrix
    transpose  the entries in the order of their neurons

Shapes: T tokens, D d_model, F d_ff, C chunks of S tokens, B blocks of N neurons, A entries, G groups, L lanes of a
vector. Entries stand by chunk, in it by block, in that by token and neuron: those of chunk c, block b and token t (of
the chunk) are the places base[c] + starts[c, b·S + t] up to the next one's. `order` and `tokens` hold for each place
of the other order, by chunk and neuron, which entry stands there (counted from base[c]) and its token;
`firsts[c, i]` is the first place of a neuron, from base[c].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from switchable.compute.cpu.llvm import BFLOAT16, I32, I64, Values, Writer, i64
from switchable.compute.cpu.tasks import Record, Tasks

SIZES = ("per_chunk", "blocks", "per_block", "neuron_count", "token_count")
COMPRESSED = 64  # bytes of a vector that an instruction of AVX-512 compresses
ENTRIES = ("base", "starts", "neurons", "values")
COLLECT = Tasks((*SIZES, "first_chunk"), ("starts", "neurons", "values", "rows"))
"""Reads `rows` [.., F], the tokens from `first_chunk` on; writes `starts` and, for each chunk as if all were active,
`neurons` and `values` [.., S·F]. A task is a chunk."""
TRANSPOSE = Tasks(SIZES, (*ENTRIES, "firsts", "order", "tokens"))
"""Reads no `values`; writes `firsts` [C, F + 2], `order` and `tokens` [A]. A task is a chunk."""


def write_collect(w: Writer, *, paired: bool) -> None:
    """Write the function "collect"; `rows` are bfloat16 if `paired`, `values` float32 then."""
    b, stored = w.b, BFLOAT16 if paired else w.number

    def chunk(record: Record, number: ir.Value) -> None:
        per_chunk, width = record["per_chunk"], record["neuron_count"]
        tokens = _tokens_of(w, record, w.add(number, record["first_chunk"]))
        room = w.mul(w.mul(number, per_chunk), width)
        neurons, values = w.at(record["neurons"], room, I32), w.at(record["values"], room)
        rows = w.at(record["rows"], room, stored)
        starts = _starts(w, record, w.add(number, record["first_chunk"]))

        def some(row: ir.Value, lanes: int) -> Callable[[ir.Value, Values], Values]:
            def write(j: ir.Value, carried: Values) -> Values:
                (count,), each = carried, ir.VectorType(I32, lanes)
                value = b.load(w.at(row, j, stored), align=2, typ=ir.VectorType(stored, lanes))
                value = b.fpext(value, w.vector_of(lanes)) if paired else value
                active = b.not_(b.fcmp_ordered("<=", value, w.zero(value.type)))  # a NaN is kept
                numbers = b.add(w.broadcast(b.trunc(j, I32), lanes), ir.Constant(each, [*range(lanes)]))
                # No branch to guess: what lies behind the entries is overwritten by the next ones.
                w.store(w.compress(value, active), w.at(values, count))
                b.store(w.compress(numbers, active), w.at(neurons, count, I32), align=4)
                return [w.add(count, w.count(active))]

            return write

        def block(number: ir.Value, carried: Values) -> Values:
            begin = w.mul(number, record["per_block"])
            end = w.minimum(w.add(begin, record["per_block"]), width)
            places = w.at(starts, w.mul(number, per_chunk), I32)

            def token(t: ir.Value, carried: Values) -> Values:
                w.put32(carried[0], w.at(places, t, I32))
                row = w.at(rows, w.mul(t, width), stored)

                j = begin
                for lanes in (w.lanes, 1) if w.lanes * w.itemsize == COMPRESSED else (1,):
                    j, carried = w.loop(j, w.sub(end, lanes - 1), lanes, carried, some(row, lanes))
                return carried

            _, carried = w.loop(0, tokens, 1, carried, token)
            # The last chunk may be short; the tokens that it lacks have no entries.
            w.range(tokens, per_chunk, 1, lambda t: w.put32(carried[0], w.at(places, t, I32)))
            return carried

        _, (count,) = w.loop(0, record["blocks"], 1, [i64(0)], block)
        w.put32(count, w.at(starts, w.mul(record["blocks"], per_chunk), I32))

    COLLECT.write(w, chunk)


def write_transpose(w: Writer) -> None:
    """Write the function "transpose": a counting sort of each chunk."""
    b = w.b

    def chunk(record: Record, number: ir.Value) -> None:
        width = record["neuron_count"]
        firsts = w.at(record["firsts"], w.mul(number, w.add(width, 2)), I32)
        base = w.integer(w.at(record["base"], number, I64), I64)
        order, tokens = (w.at(record[name], base, I32) for name in ("order", "tokens"))
        w.each(w.add(width, 2), lambda i: b.store(I32(0), w.at(firsts, i, I32)))

        def each_entry(body: Callable[[ir.Value, ir.Value, ir.Value], None]) -> None:
            def token(_: Record, place: Place) -> None:
                def entry(e: ir.Value) -> None:
                    body(place.token, e, w.integer(w.at(place.neurons, e, I32)))

                w.range(place.begin, place.end, 1, entry)

            each_token(w, record, number, token)

        # Counted two places on, so that after adding up the place before holds where the neuron goes on.
        def count(_token: ir.Value, _e: ir.Value, neuron: ir.Value) -> None:
            w.increment(w.at(firsts, w.add(neuron, 2), I32))

        def put(token: ir.Value, e: ir.Value, neuron: ir.Value) -> None:
            place = b.zext(w.increment(w.at(firsts, w.add(neuron, 1), I32)), I64)
            w.put32(e, w.at(order, place, I32))
            w.put32(token, w.at(tokens, place, I32))

        def add_up(i: ir.Value, carried: Values) -> Values:
            place = w.at(firsts, i, I32)
            total = w.add(carried[0], b.load(place, typ=I32))
            b.store(total, place)
            return [total]

        each_entry(count)
        w.loop(0, w.add(width, 2), 1, [I32(0)], add_up)
        each_entry(put)

    TRANSPOSE.write(w, chunk)


class Place(NamedTuple):
    """The entries of a token in a block: `begin` to `end` of its chunk's `neurons` and `values`."""

    block: ir.Value
    token: ir.Value
    begin: ir.Value
    end: ir.Value
    neurons: ir.Value
    values: ir.Value


def _tokens_of(w: Writer, record: Record, chunk: ir.Value) -> ir.Value:
    """How many tokens a chunk has: S, the last one possibly fewer."""
    begin = w.mul(chunk, record["per_chunk"])
    return w.minimum(record["per_chunk"], w.sub(record["token_count"], begin))


def _starts(w: Writer, record: Record, chunk: ir.Value) -> ir.Value:
    """The address of a chunk's part of `starts`."""
    length = w.add(w.mul(record["blocks"], record["per_chunk"]), 1)
    return w.at(record["starts"], w.mul(chunk, length), I32)


class NeuronPlace(NamedTuple):
    """The entries of a neuron in a chunk: `begin` to `end` of the chunk's `order` and `tokens`."""

    neuron: ir.Value
    begin: ir.Value
    end: ir.Value
    order: ir.Value
    tokens: ir.Value
    values: ir.Value
    """The chunk's, as `order` counts them."""


def each_neuron(
    w: Writer, record: Record, number: ir.Value, body: Callable[[Record, NeuronPlace], None]
) -> None:
    """body(record, place) for each chunk, and in it for each neuron of a task's range."""
    begin, end = w.share(record["neuron_count"], number, record["tasks"])

    def chunk(c: ir.Value) -> None:
        base = w.integer(w.at(record["base"], c, I64), I64)
        firsts = w.at(record["firsts"], w.mul(c, w.add(record["neuron_count"], 2)), I32)
        order, tokens = (w.at(record[name], base, I32) for name in ("order", "tokens"))
        values = w.at(record["values"], base)

        def neuron(i: ir.Value) -> None:
            first, after = (w.integer(w.at(firsts, at, I32)) for at in (i, w.add(i, 1)))
            body(record, NeuronPlace(i, first, after, order, tokens, values))

        w.range(begin, end, 1, neuron)

    w.each(record["chunks"], chunk)


def each_token(w: Writer, record: Record, chunk: ir.Value, body: Callable[[Record, Place], None]) -> None:
    """body(record, place) for each block, and in it for each token of a chunk."""
    tokens, starts = _tokens_of(w, record, chunk), _starts(w, record, chunk)
    base = w.integer(w.at(record["base"], chunk, I64), I64)
    neurons, values = w.at(record["neurons"], base, I32), w.at(record["values"], base)

    def block(number: ir.Value) -> None:
        own = w.at(starts, w.mul(number, record["per_chunk"]), I32)

        def token(t: ir.Value) -> None:
            begin, end = (w.integer(w.at(own, at, I32)) for at in (t, w.add(t, 1)))
            first = w.mul(chunk, record["per_chunk"])
            body(record, Place(number, w.add(first, t), begin, end, neurons, values))

        w.each(tokens, token)

    w.each(record["blocks"], block)
