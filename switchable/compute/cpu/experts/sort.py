"""Sorting the (token, expert) pairs of a batch in compiled code, and walking through them.

Tokens are taken in chunks, and within a chunk pairs stand in the order of their experts, an expert's in the order of
the tokens: the places `starts[c, e]` to `starts[c, e + 1]` are those of expert e in chunk c. Pairs of no expert, number
E, stand behind them, where nobody looks. A counting sort: count the pairs of each expert, add the counts up to first
places, put each pair in the next place of its expert.

Shapes: T tokens, E experts, K experts per token, P = T·K pairs, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from switchable.compute.cpu.experts.kernels import Loops
from switchable.compute.cpu.llvm import I32, I64, POINTER, Values, Writer
from switchable.compute.cpu.tasks import Record, Tasks

SORT = Tasks(
    numbers=("experts", "chosen", "per_chunk", "token_count"),
    addresses=("ids", "tokens", "starts", "cursors"),
)
"""Reads `ids` [T, K], int64; writes, int32, `tokens` [P] and `starts` [C, E + 1]; `cursors` [C, E + 1] is scratch. A
task is a chunk of `per_chunk` tokens."""


def write_sort(loops: Loops) -> None:
    """Write the function "sort"."""
    w = Writer(loops.module, "sort", [POINTER], wide=False, lanes=4)
    SORT.write(w, lambda record, chunk: sort_chunk(w, record, chunk))


def sort_chunk(w: Writer, record: Record, chunk: ir.Value) -> None:
    """Write what puts a chunk's pairs in order."""
    b, chosen, columns = w.b, record["chosen"], w.add(record["experts"], 1)
    begin = w.mul(chunk, record["per_chunk"])
    end = w.minimum(w.add(begin, record["per_chunk"]), record["token_count"])
    own = w.mul(chunk, columns)
    # `cursors` holds each expert's count, then the place of its next pair.
    starts, cursors = w.at(record["starts"], own, I32), w.at(record["cursors"], own, I32)

    def each_pair(body: Callable[[ir.Value, ir.Value], object]) -> None:
        """body(token, address of the expert's cursor)."""

        def token(t: ir.Value) -> None:
            def pair(k: ir.Value) -> None:
                expert = w.integer(w.at(record["ids"], w.add(w.mul(t, chosen), k), I64), I64)
                body(t, w.at(cursors, expert, I32))

            w.each(chosen, pair)

        w.range(begin, end, 1, token)

    def begin_expert(e: ir.Value, carried: Values) -> Values:
        count = b.load(w.at(cursors, e, I32), typ=I32)
        for table in (starts, cursors):
            b.store(carried[0], w.at(table, e, I32))
        return [w.add(carried[0], count)]

    def put(t: ir.Value, cursor: ir.Value) -> None:
        w.put32(t, w.at(record["tokens"], b.zext(w.increment(cursor), I64), I32))

    w.each(columns, lambda e: b.store(I32(0), w.at(cursors, e, I32)))
    each_pair(lambda _token, cursor: w.increment(cursor))
    w.loop(0, columns, 1, [b.trunc(w.mul(begin, chosen), I32)], begin_expert)
    each_pair(put)


def segment(w: Writer, record: Record, chunk: ir.Value, expert: ir.Value) -> tuple[ir.Value, ir.Value]:
    """An expert's first place in a chunk, and how many it has; the record has `starts` and `experts`."""
    place = w.add(w.mul(chunk, w.add(record["experts"], 1)), expert)
    first, after = (w.integer(w.at(record["starts"], at, I32)) for at in (place, w.add(place, 1)))
    return first, w.sub(after, first)
