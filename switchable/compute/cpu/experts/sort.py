"""Sorting the (token, expert) pairs of a batch in compiled code, and walking through them.

Tokens are taken in chunks, and within a chunk pairs stand in the order of their experts, an expert's in the order of
the tokens: the places `starts[c, e]` to `starts[c, e + 1]` are those of expert e in chunk c.

Shapes: T tokens, E experts, K experts per token, P = T·K pairs, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from switchable.compute.cpu.llvm import I32, I64, POINTER, Values, Writer, smaller, whole
from switchable.compute.cpu.tasks import Record, Tasks

SORT = Tasks(
    numbers=("experts", "chosen", "per_chunk", "token_count"),
    addresses=("ids", "tokens", "order", "starts", "filled"),
)
"""Reads `ids` [T, K], int64; writes, int32, `tokens` [P], `order` [P] (which pair t·K + k stands in each place) and
`starts` [C·E + 1]; `filled` [C·E] is scratch. A task is a chunk of `per_chunk` tokens."""


def write_sort(module: ir.Module) -> None:
    """Write the function "sort": a counting sort of each chunk."""
    w = Writer(module, "sort", [POINTER], wide=False, lanes=4)
    SORT.write(w, lambda record, chunk: _sort_chunk(w, record, chunk))


def _sort_chunk(w: Writer, record: Record, chunk: ir.Value) -> None:
    b, chosen, experts = w.b, record["chosen"], record["experts"]
    begin = b.mul(chunk, record["per_chunk"])
    end = smaller(w, b.add(begin, record["per_chunk"]), record["token_count"])
    own = b.mul(chunk, experts)
    starts, filled = w.at(record["starts"], own, I32), w.at(record["filled"], own, I32)

    def each_pair(body: Callable[[ir.Value, ir.Value, ir.Value], object]) -> None:
        """body(token, pair, where its expert is counted)."""

        def token(t: ir.Value, _: Values) -> Values:
            def pair(k: ir.Value) -> None:
                number = b.add(b.mul(t, chosen), k)
                body(t, number, w.at(filled, w.integer(w.at(record["ids"], number, I64), I64), I32))

            w.each(chosen, pair)
            return []

        w.loop(begin, end, whole(1), [], token)

    def counted(address: ir.Value) -> ir.Value:
        before = b.load(address, typ=I32)
        b.store(b.add(before, I32(1)), address)
        return before

    def begin_expert(e: ir.Value, carried: Values) -> Values:
        count = b.load(w.at(filled, e, I32), typ=I32)
        for table in (starts, filled):
            b.store(carried[0], w.at(table, e, I32))
        return [b.add(carried[0], count)]

    def put(t: ir.Value, number: ir.Value, address: ir.Value) -> None:
        place = b.zext(counted(address), I64)
        b.store(b.trunc(t, I32), w.at(record["tokens"], place, I32))
        b.store(b.trunc(number, I32), w.at(record["order"], place, I32))

    w.each(experts, lambda e: b.store(I32(0), w.at(filled, e, I32)))
    each_pair(lambda _token, _pair, address: counted(address))
    first, last = (b.trunc(b.mul(bound, chosen), I32) for bound in (begin, end))
    w.loop(whole(0), experts, whole(1), [first], begin_expert)
    each_pair(put)
    # The next chunk writes the same number there; after the last one it is the end.
    b.store(last, w.at(starts, experts, I32))


def segment(w: Writer, record: Record, chunk: ir.Value, expert: ir.Value) -> tuple[ir.Value, ir.Value]:
    """An expert's first place in a chunk, and how many it has; the record has `starts` and `experts`."""
    place = w.b.add(w.b.mul(chunk, record["experts"]), expert)
    first, after = (w.integer(w.at(record["starts"], at, I32)) for at in (place, w.b.add(place, whole(1))))
    return first, w.b.sub(after, first)
