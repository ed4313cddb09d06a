"""Attention of one new token of each of some sequences over what is in the cache, in one call of compiled code.

    s_i = q · k_i / √C,   p = exp(s - max s),   y = Σ p_i · v_i / Σ p_i,   i from the first place that is not padding

A task is a sequence and a head of keys, with all heads of queries that share it. Reading the cache is what takes time;
torch's own attention takes 2 to 25 times as long for one query, most of all in bfloat16.

In a small model calls take longer than that. So it can be given what the projections of a token came to, side by side:
it turns queries and keys by their place, and writes keys and values where they belong, before it attends.

exp(x) = 2^n · 2^f with n = round(x / ln 2): the second factor is a polynomial, good to 1e-8.

Shapes: B sequences, P places, H heads, G heads of keys and values, C numbers in a head.
"""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.code import Code
from switchable.compute.cpu.decode.rows import Rows
from switchable.compute.cpu.llvm import I32, I64, POINTER, Machine, Values, Writer, this_machine
from switchable.compute.cpu.tasks import Record, Run, Tasks, floats

TERMS = 8
"""Of the series of 2^f, for |f| up to 1/2."""
LEAST_POWER = -126
"""Of 2 that is a float32 like any other."""
SPARE = 64
"""Places behind the scores of a head: a whole vector of them is made powers of."""
AHEAD = 4
"""Values between the one added and the one prefetched."""
ATTEND = Tasks(
    numbers=("end", "places", "groups", "shared", "q_step", "head_step", "angle_step"),
    addresses=("q", "cos", "sin", "keys", "values", "first", "scores", "y"),
)
"""`first` [B] is where a sequence begins, `scores` [B · G, P + SPARE] is scratch; keys and values follow the queries in
`q` if they are new."""
WORTH_THREADS = 2**18
"""Bytes of the cache from which several threads are faster than one."""


class AttendCall:
    """Attention over a cache of a layer; for one Python thread at a time.

    Args:
        cache: keys and values, [2, B, G, P, C], float32 or bfloat16, contiguous; C fills vectors.
        heads: H.
        first_B: int64, the first place of each sequence.
        scratch: float32, [B · G, P + SPARE].
        turned: how many numbers of a head are turned by its place; None if calls get queries alone, turned already.
    """

    def __init__(
        self, cache: Tensor, heads: int, first_B: Tensor, scratch: Tensor, turned: int | None = None
    ):
        _, sequences, groups, places, size = cache.shape
        code = _code(cache.dtype, size, turned, cast(Machine, this_machine()))
        tasks = sequences * groups
        sizes = {"places": places, "groups": groups, "shared": heads // groups}
        memory = {"keys": cache[0], "values": cache[1], "first": first_B, "scores": scratch}
        # One thread for one task; then it is given all of them.
        self.alone, self.in_threads = (
            Run(ATTEND, code, "attend", count, **sizes, **memory) for count in (1, tasks)
        )
        self.places = self.alone.places
        self.alone.record[self.places["tasks"]] = tasks
        self.bytes = 2 * tasks * size * cache.itemsize
        self.memory = (cache, first_B, scratch)
        self.shape = (sequences, heads * size)

    def __call__(self, q_BHC: Tensor, end: int, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return y [B, H · C] for queries in float32, any strides but the last, over places before `end`.

        Unless `turned` is None keys and values follow, [B, H + 2G, C], and what they are turned by is given: cos, and
        sin with the sign of the half that it is multiplied with, [B or 1, 1, 1, turned], contiguous.
        """
        y = floats(self.shape)
        run = self.told(q_BHC, y, in_threads=end * self.bytes >= WORTH_THREADS)
        record, places = run.record, self.places
        record[places["end"]] = end
        if angles is not None:
            record[places["cos"]], record[places["sin"]] = (each.data_ptr() for each in angles)
            record[places["angle_step"]] = angles[0].shape[-1] if len(angles[0]) > 1 else 0
        run()
        return y

    def told(self, q_BHC: Tensor, y: Tensor, *, in_threads: bool = True) -> Run:
        """Return what writes y once it knows `end` and angles."""
        run = self.in_threads if in_threads else self.alone
        record, places = run.record, self.places
        record[places["q"]], record[places["y"]] = q_BHC.data_ptr(), y.data_ptr()
        record[places["q_step"]], record[places["head_step"]] = q_BHC.stride(0), q_BHC.stride(1)
        return run


@functools.cache
def _code(dtype: torch.dtype, size: int, turned: int | None, machine: Machine) -> Code:
    module, lanes = ir.Module("attend"), machine.vector_bytes // 4
    w = Writer(module, "attend", [POINTER], wide=False, lanes=lanes)
    rows = Rows(dtype, size, lanes)

    def task(record: Record, number: ir.Value) -> None:
        sequence, group = w.div(number, record["groups"]), w.b.srem(number, record["groups"])
        first = w.integer(w.at(record["first"], sequence, I64), I64)
        start = w.mul(w.mul(number, record["places"]), size)
        keys, values = (rows.at(w, record[name], start) for name in ("keys", "values"))
        scores = w.at(record["scores"], w.mul(number, w.add(record["places"], SPARE)))
        heads = w.mul(record["groups"], record["shared"])
        own_q = w.scratch(size)

        def given(h: ir.Value) -> ir.Value:
            return w.at(record["q"], w.add(w.mul(sequence, record["q_step"]), w.mul(h, record["head_step"])))

        def in_place(h: ir.Value, by: int) -> list[ir.Value]:
            cos, sin = (w.at(record[name], w.mul(sequence, record["angle_step"])) for name in ("cos", "sin"))
            return _turned(w, given(h), cos, sin, by, size)

        if turned is not None:
            new = w.mul(w.sub(record["end"], 1), size)
            for target, h, by in ((keys, heads, turned), (values, w.add(heads, record["groups"]), 0)):
                for v, vector in enumerate(in_place(w.add(h, group), by)):
                    rows.store(w, vector, rows.at(w, target, w.add(new, v * w.lanes)))

        def head(k: ir.Value) -> None:
            h = w.add(w.mul(group, record["shared"]), k)
            q = given(h)
            if turned:
                q = own_q
                w.store_vectors(in_place(h, turned), q)
            out = w.at(record["y"], w.mul(w.add(w.mul(sequence, heads), h), size))
            largest = _scores(w, rows, keys, q, scores, first, record["end"], size)
            total = _powers(w, scores, first, record["end"], largest)
            _sum(w, rows, values, scores, out, (first, record["end"]), total, size)

        w.each(record["shared"], head)

    ATTEND.write(w, task)
    return Code.of(module, "attend", machine)


def _turned(
    w: Writer, head: ir.Value, cos: ir.Value, sin: ir.Value, turned: int, size: int
) -> list[ir.Value]:
    """A head's numbers, the first of them turned: a half with the other, whole vectors each."""
    numbers, half = w.vectors(head, size // w.lanes), turned // 2 // w.lanes
    own = list(numbers)
    for v in range(2 * half):
        place, other = v * w.lanes, numbers[v + half if v < half else v - half]
        straight = w.b.fmul(numbers[v], w.load(w.at(cos, place)))
        own[v] = w.fma(other, w.load(w.at(sin, place)), straight)
    return own


def _scores(
    w: Writer,
    rows: Rows,
    keys: ir.Value,
    q: ir.Value,
    scores: ir.Value,
    first: ir.Value,
    end: ir.Value,
    size: int,
) -> ir.Value:
    """Write the scores of places, and return the largest."""
    highest = w.scratch(1)
    w.store(ir.Constant(w.number, -math.inf), highest)
    scale = ir.Constant(w.number, size**-0.5)

    def tile(i: ir.Value, count: int) -> None:
        addresses = [rows.at(w, keys, w.mul(w.add(i, r), size)) for r in range(2 * count)]
        (sums,) = rows.dots(w, addresses[:count], addresses[count:], [q], size)
        for r, each in enumerate(sums):
            value = w.b.fmul(w.reduce_add(each), scale)
            w.store(value, w.at(scores, w.add(i, r)))
            before = w.load(highest, w.number)
            larger = w.b.fcmp_unordered(">", value, before)
            w.store(w.b.select(larger, value, before), highest)

    w.tiles(end, (4, 2, 1), tile, start=first)
    return w.load(highest, w.number)


def _powers(w: Writer, scores: ir.Value, first: ir.Value, end: ir.Value, largest: ir.Value) -> ir.Value:
    """Make exp(score - largest) of each score, and return their sum."""
    repeated = w.broadcast(largest, w.lanes)
    for lane in range(w.lanes):  # what is behind the last score counts as nothing
        w.store(ir.Constant(w.number, -math.inf), w.at(scores, w.add(end, lane)))

    def step(i: ir.Value, total: Values) -> Values:
        place = w.at(scores, i)
        power = _exponential(w, w.b.fsub(w.load(place), repeated))
        w.store(power, place)
        return [w.b.fadd(total[0], power)]

    return w.reduce_add(w.loop(first, end, w.lanes, [w.zero()], step)[1][0])


def _exponential(w: Writer, x: ir.Value) -> ir.Value:
    """exp of a vector of numbers that are not above 0."""
    kind, integers = x.type, ir.VectorType(I32, w.lanes)

    def constant(value: float) -> ir.Constant:
        return ir.Constant(kind, [value] * w.lanes)

    least = constant(LEAST_POWER)
    power = w.b.fmul(x, constant(1 / math.log(2)))
    power = w.b.select(w.b.fcmp_ordered("<", power, least), least, power)  # a NaN stays one
    whole = w.call(f"llvm.rint.v{w.lanes}f32", kind, power)
    rest = w.b.fsub(power, whole)
    value = constant(math.log(2) ** (TERMS - 1) / math.factorial(TERMS - 1))
    for k in reversed(range(TERMS - 1)):
        value = w.fma(value, rest, constant(math.log(2) ** k / math.factorial(k)))
    bits = w.b.add(w.b.fptosi(whole, integers), ir.Constant(integers, [127] * w.lanes))
    return w.b.fmul(value, w.b.bitcast(w.b.shl(bits, ir.Constant(integers, [23] * w.lanes)), kind))


def _sum(
    w: Writer,
    rows: Rows,
    values: ir.Value,
    scores: ir.Value,
    out: ir.Value,
    between: tuple[ir.Value, ir.Value],
    total: ir.Value,
    size: int,
) -> None:
    """Write the mean of the values, weighted by what has become of the scores."""
    vectors = size // w.lanes

    def step(i: ir.Value, sums: Values) -> Values:
        rows.prefetch(w, rows.at(w, values, w.mul(w.add(i, AHEAD), size)), vectors)
        share = w.load_broadcast(w.at(scores, i))
        own = rows.vectors(w, rows.at(w, values, w.mul(i, size)), vectors)
        return [w.fma(share, value, before) for value, before in zip(own, sums, strict=True)]

    _, sums = w.loop(*between, 1, [w.zero()] * vectors, step)
    scale = w.broadcast(w.b.fdiv(ir.Constant(w.number, 1.0), total), w.lanes)
    w.store_vectors([w.b.fmul(value, scale) for value in sums], out)
