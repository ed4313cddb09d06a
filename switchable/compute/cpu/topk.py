"""The K highest of E scores for many tokens, on the CPU: `torch.topk` without its sorting of pairs.

A float's bits, read as an integer (those of negative numbers but the sign inverted), stand in the order of the floats.
So the K-th highest score of a token is found bit by bit from the top: keep a bit of the threshold if at least K scores
reach it. That is a comparison of all scores at once and a count, at most 32 times, and fewer as soon as exactly K
reach it. `torch.topk` takes 1 µs for a token of 128 scores, this a ninth of that.

Of the K a token may need fewer. An expert's share is the router's estimate of its part in the token's activation mass,
p = softmax(scores): what the router learns (`ffn/router.py`). With a `mass` below 1 a token keeps expert e if

    Σ p over the experts that score higher than e  <  mass

so the fewest whose shares add up to the mass, one at least. The id E stands in the other places: no expert.

Shapes: T tokens, E experts, K experts per token at most.
"""

from __future__ import annotations

import functools

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.code import Code
from switchable.compute.cpu.limits import why_not_in_memory
from switchable.compute.cpu.llvm import I32, I64, POINTER, Index, Machine, Values, Writer, i64, this_machine
from switchable.compute.cpu.tasks import Record, Tasks

FEWEST_TOKENS = 64
"""With fewer, `torch.topk` takes no time worth a compilation."""
MOST_EXPERTS = 1024
"""Comparisons are written out, one after another."""
TASK_TOKENS = 64
TASKS = Tasks(numbers=("tokens",), addresses=("scores", "ids"))


def top_experts(scores_TE: Tensor, experts_per_token: int, mass: float = 1.0) -> Tensor:
    """Return ids_TK of the highest scores, in any order; of equal scores, any. NaN counts as highest.

    With a `mass` below 1 a token has the fewest of them whose shares add up to it, and the id E in the other places.
    """
    tokens, experts = scores_TE.shape
    if (
        torch.compiler.is_compiling()  # first: what is traced must not look for a compiler of our own
        or (machine := this_machine()) is None
        or scores_TE.device.type != "cpu"
        or scores_TE.dtype != torch.float32
        or tokens < FEWEST_TOKENS
        or not (experts_per_token < experts or mass < 1)
        or experts > MOST_EXPERTS
        or why_not_in_memory(scores_TE) is not None
    ):
        return _in_torch(scores_TE, experts_per_token, mass)
    ids_TK = torch.empty(tokens, experts_per_token, dtype=torch.int64, device="cpu")
    code, tasks = _code(experts, experts_per_token, mass, machine), -(-tokens // TASK_TOKENS)
    TASKS.run(code, "select", tasks, scores=scores_TE.detach().contiguous(), ids=ids_TK, tokens=tokens)
    return ids_TK


def _in_torch(scores_TE: Tensor, experts_per_token: int, mass: float) -> Tensor:
    highest = scores_TE.topk(experts_per_token, dim=-1, sorted=mass < 1)
    if mass == 1:
        return highest.indices
    shares_TK = (highest.values - scores_TE.logsumexp(dim=-1, keepdim=True)).exp()
    before_TK = shares_TK.cumsum(dim=-1) - shares_TK
    return highest.indices.masked_fill(before_TK >= mass, scores_TE.shape[-1])


@functools.cache
def _code(experts: int, chosen: int, mass: float, machine: Machine) -> Code:
    module = ir.Module("selection")
    w = Writer(module, "select", [POINTER], wide=False, lanes=machine.vector_bytes // 4)

    def rows(record: Record, number: ir.Value) -> None:
        start = w.mul(number, TASK_TOKENS)
        stop = w.minimum(w.add(start, TASK_TOKENS), record["tokens"])

        def row(t: ir.Value) -> None:
            scores = w.at(record["scores"], w.mul(t, experts))
            write_selection(w, scores, w.at(record["ids"], w.mul(t, chosen), I64), experts, chosen, mass)

        w.range(start, stop, 1, row)

    TASKS.write(w, rows)
    return Code.of(module, "select", machine)


def write_selection(
    w: Writer, scores: ir.Value, ids: ir.Value, experts: int, chosen: int, mass: float = 1.0
) -> None:
    """Write the ids of the highest scores of one token, E in place of those beyond the mass."""
    b, lanes = w.b, min(experts & -experts, w.lanes)
    integers = ir.VectorType(I32, lanes)
    vectors = [_ordered(w, w.load(w.at(scores, first), integers)) for first in range(0, experts, lanes)]

    def reaching(threshold: ir.Value) -> ir.Value:
        repeated, total = w.broadcast(threshold, lanes), i64(0)
        for keys in vectors:
            total = w.add(total, w.count(w.compare(keys, ">=", repeated)))
        return total

    # Bits from the top; `enough` is the number of scores that reach the threshold found so far.
    before = b.block
    head, after = (b.function.append_basic_block(name) for name in ("bit", "found"))
    b.branch(head)
    b.position_at_end(head)
    threshold, step, enough = b.phi(I32), b.phi(I32), b.phi(I64)
    trial = w.add(threshold, step)
    count = reaching(trial)
    keep = w.compare(count, ">=", chosen)
    new_threshold, new_enough = b.select(keep, trial, threshold), b.select(keep, count, enough)
    new_step = b.lshr(step, I32(1))
    for phi, first, later in (
        (threshold, I32(-(2**31)), new_threshold),
        (step, I32(-(2**31)), new_step),
        (enough, i64(experts), new_enough),
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(later, head)
    done = b.or_(w.compare(new_enough, "==", chosen), w.compare(new_step, "==", I32(0)))
    b.cbranch(done, after, head)
    b.position_at_end(after)
    _write(w, scores, ids, w.broadcast(new_threshold, lanes), experts, chosen)
    if mass < 1:
        _drop(w, scores, ids, experts, chosen, mass)


def _write(
    w: Writer, scores: ir.Value, ids: ir.Value, threshold: ir.Value, experts: int, chosen: int
) -> None:
    """Write the experts above the threshold, a vector of it, and as many of those that equal it as are wanted."""
    b, integers = w.b, threshold.type
    lanes, found = integers.count, w.scratch(experts + integers.count, I32)

    def those(sign: str, position: ir.Value) -> ir.Value:
        def some(first: ir.Value, carried: Values) -> Values:
            taken = w.compare(_ordered(w, w.load(w.at(scores, first), integers)), sign, threshold)
            numbers = b.add(w.broadcast(b.trunc(first, I32), lanes), ir.Constant(integers, [*range(lanes)]))
            w.store(w.compress(numbers, taken), w.at(found, carried[0], I32))
            return [w.add(carried[0], w.count(taken))]

        return w.loop(0, experts, lanes, [position], some)[1][0]

    those("==", those(">", i64(0)))
    first = 0
    for size in (8, 4, 2, 1):  # no number more: behind them are another token's
        while first + size <= chosen:
            numbers = b.load(w.at(found, first, I32), align=4, typ=ir.VectorType(I32, size))
            b.store(b.zext(numbers, ir.VectorType(I64, size)), w.at(ids, first, I64), align=8)
            first += size


def _drop(w: Writer, scores: ir.Value, ids: ir.Value, experts: int, chosen: int, mass: float) -> None:
    """Write E in place of the experts that all those above them make up the mass without."""
    b, lanes, parts = w.b, min(experts & -experts, w.lanes), w.scratch(experts)
    vector, number = w.vector_of(lanes), w.number

    def score(e: Index) -> ir.Value:
        return w.load(w.at(scores, e), number)

    def higher(e: ir.Value, highest: Values) -> Values:
        return [b.select(b.fcmp_ordered(">", score(e), highest[0]), score(e), highest[0])]

    def share(e: ir.Value, total: Values) -> Values:
        part = w.call("expf", number, b.fsub(score(e), highest))
        w.store(part, w.at(parts, e))
        return [b.fadd(total[0], part)]

    _, (highest,) = w.loop(1, experts, 1, [score(0)], higher)
    _, (total,) = w.loop(0, experts, 1, [w.zero(number)], share)
    limit = b.fmul(total, ir.Constant(number, mass))

    def decide(k: ir.Value) -> None:
        place = w.at(ids, k, I64)
        own = score(b.load(place, typ=I64))
        repeated, above = w.broadcast(own, lanes), w.zero(vector)
        for first in range(0, experts, lanes):
            better = b.fcmp_ordered(">", w.load(w.at(scores, first), vector), repeated)
            above = b.fadd(above, b.select(better, w.load(w.at(parts, first), vector), w.zero(vector)))
        beyond = b.fcmp_ordered(">=", w.reduce_add(above), limit)
        b.store(b.select(beyond, i64(experts), b.load(place, typ=I64)), place)

    w.each(chosen, decide)


def _ordered(w: Writer, bits: ir.Value) -> ir.Value:
    """Integers in the order of the floats that have these bits."""
    b, kind = w.b, bits.type
    thirty_one, low = (
        ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)
        for value in (31, 2**31 - 1)
    )
    return b.xor(bits, b.and_(b.ashr(bits, thirty_one), low))
