"""Experts without gradients for many tokens: all that `fused` does, and a router's choice, in one compiled call.

A task is a chunk of tokens. It scores and chooses, sorts its pairs, multiplies, adds up, adds the bias of the output
projection and rounds, while what it works on is in its core's cache. Weights are put in order by each chunk for itself,
or beforehand for many chunks, which is a stage of its own.

What a call takes besides its products decides whether a few hundred tokens of a small model are faster than dense, so
`Prefill` looks up beforehand whatever does not depend on the tokens.

Shapes as in `kernels.py`; F = E·I neurons.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple, cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.call import FFNWeights
from switchable.compute.cpu.code import Code
from switchable.compute.cpu.experts.dot import BY_CHUNK, dot_stages
from switchable.compute.cpu.experts.kernels import AHEAD, PAIRS, Loops
from switchable.compute.cpu.experts.library import Library, library
from switchable.compute.cpu.experts.packing import Packing, suited
from switchable.compute.cpu.experts.scatter import scatter_stages
from switchable.compute.cpu.experts.sort import sort_chunk
from switchable.compute.cpu.llvm import CACHE_LINE, I64, Values, Writer, i64
from switchable.compute.cpu.tasks import Record, Tasks
from switchable.compute.cpu.topk import write_selection

TILE = (4, 2, 1)
"""Tokens, and experts, whose scores are computed side by side."""
MOST_KEPT = 2**25
"""Bytes that a thread keeps from call to call; getting more than that takes no time that is felt."""
PREFILL = Tasks(
    ("experts", "chosen", "per_chunk", "token_count"),
    (
        *PAIRS, "cursors", "x", "router", "router_bias", "scores", "ids", "entrance", "entrance_bias",
        "entrance_packed", "factor", "factor_bias", "factor_packed", "hidden", "down", "down_packed", "start", "sums",
        "y",
    ),
    stages=2,
)  # fmt: skip
"""Tasks are experts, whose weights are put in order (no tasks if each chunk does so for itself), and then chunks. `y`
[T, D] is written, in the dtype that is multiplied. `start` [D] is what its rows begin with. `packed`, `hidden` [P, I],
`sums` [T, D], which may be y, and what `sort.py` writes are scratch; so are `scores` [T, E] and `ids` [T, K], where a
router chooses."""


class Routing(NamedTuple):
    """A router's choice."""

    experts: int
    chosen: int
    mass: float


class Parts(NamedTuple):
    """What a function does."""

    bias: bool
    factor_bias: bool
    squared: bool
    factor: bool
    start: bool
    """Whether something is added to every row."""
    routing: Routing | None
    by_chunk: bool = True
    """Whether each chunk puts weights in order for itself."""


class Prefill:
    """A call with everything looked up but the tokens, as long as the weights stay where they are.

    Args:
        loops: for the experts' shape.
        weights: matrices in the dtype that is multiplied, contiguous.
        num_experts: E.
        squared: whether the activation is ReLU's square.
        start_D: what is added to every row: the bias of the output projection.
        router: its weight [E, D] and bias [E], and K and the mass, of `topk.py`; None: calls are given ids.
    """

    def __init__(
        self,
        loops: Library,
        weights: FFNWeights,
        num_experts: int,
        *,
        squared: bool,
        start_D: Tensor | None = None,
        router: tuple[Tensor, Tensor, int, float] | None = None,
    ):
        self.loops, self.experts, routing = loops, num_experts, None
        (entrance_FD, entrance_F), (factor_FD, factor_F) = weights.entrance_and_factor
        self.fixed = {"entrance": entrance_FD, "factor": factor_FD, "down": weights.down_FD}
        self.biases = {"entrance_bias": entrance_F, "factor_bias": factor_F, "start": start_D}
        self.router_ED: Tensor | None = None
        if router is not None:
            self.router_ED, self.biases["router_bias"], chosen, mass = router
            routing = Routing(num_experts, chosen, mass)
        self.parts = Parts(
            bias=entrance_F is not None,
            factor_bias=factor_F is not None,
            squared=squared,
            factor=factor_FD is not None,
            start=start_D is not None,
            routing=routing,
        )

    def __call__(self, x_TD: Tensor, ids_TK: Tensor | None = None) -> Tensor:
        """Return y_TD in the dtype that is multiplied, as x is; x and ids are contiguous, and ids in range."""
        chosen = cast(Routing, self.parts.routing).chosen if ids_TK is None else ids_TK.shape[1]
        loops = self._suited(len(x_TD) * chosen / self.experts)
        (per_chunk, chunks), own = loops.chunks(len(x_TD)), loops.packing
        parts = self.parts._replace(by_chunk=chunks <= torch.get_num_threads())
        y_TD = torch.empty_like(x_TD)
        sizes = self._sizes(loops, len(x_TD), chosen, chunks, parts)
        ends = [*itertools.accumulate(-(-size // CACHE_LINE) * CACHE_LINE for size in sizes.values())]
        if ends[-1] > MOST_KEPT:
            memory = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
        else:
            memory = loops.scratch("prefill", (ends[-1],), torch.uint8)
        fields: dict[str, Tensor | int | None] = {
            name: memory.data_ptr() + begin for name, begin in zip(sizes, (0, *ends), strict=False)
        }
        for name, bias in self.biases.items():  # anew each time: they may have other values by now
            fields[name] = None if bias is None else bias.to(loops.sums).contiguous()
        if self.router_ED is not None:
            fields["router"] = self.router_ED.to(own.dtype).contiguous()
        if ids_TK is not None:
            fields["ids"] = ids_TK
        if own.terms == 1:
            fields["sums"] = y_TD
        numbers = {"chosen": chosen, "per_chunk": per_chunk, "token_count": len(x_TD)}
        first = 0 if parts.by_chunk and not own.amx else self.experts
        fields |= {**self.fixed, **numbers, "experts": self.experts, "x": x_TD, "y": y_TD}
        PREFILL.run(_code(own, parts), "prefill", first, chunks, **fields)
        return y_TD

    def _suited(self, tokens: float) -> Library:
        """Return the loops for so many tokens of an expert."""
        own = self.loops.packing
        machine = suited(own.machine, own.neurons, tokens)
        return self.loops if machine is own.machine else library(own.d_model, own.neurons, own.dtype, machine)

    def _sizes(self, loops: Library, tokens: int, chosen: int, chunks: int, parts: Parts) -> dict[str, int]:
        """Return how many bytes each part of what is computed on the way takes."""
        own, number = loops.packing, loops.sums.itemsize
        pairs, places = tokens * chosen, chunks * (self.experts + 1)
        packed = number * (chunks if parts.by_chunk else self.experts) * own.vectors * own.steps * own.lanes
        return {
            "tokens": 4 * (pairs + AHEAD),
            "starts": 4 * places,
            "cursors": 4 * places,
            "entrance_packed": packed,
            "factor_packed": packed if parts.factor else 0,
            "hidden": own.dtype.itemsize * pairs * own.neurons,
            "down_packed": number * self.experts * own.scatter_words * own.d_model if own.amx else 0,
            "sums": 0 if own.terms == 1 else number * tokens * own.d_model,
            "scores": 4 * tokens * self.experts if parts.routing else 0,
            "ids": 8 * pairs if parts.routing else 0,
        }


@functools.cache
def _code(packing: Packing, parts: Parts) -> Code:
    module = ir.Module("prefill")
    write_prefill(Loops(module, packing), parts)
    return Code.of(module, "prefill", packing.machine)


def write_prefill(loops: Loops, parts: Parts) -> None:
    """Write the function "prefill"."""
    w, where = loops.writer("prefill"), BY_CHUNK if parts.by_chunk else ""
    kinds = {"entrance": f"dot{'_bias' * parts.bias}_relu{'_square' * parts.squared}"}
    if parts.factor:
        kinds["factor"] = f"dot{'_bias' * parts.factor_bias}_times"
    products = {part: dot_stages(loops, w, kind + where) for part, kind in kinds.items()}
    pack_down, add_up = scatter_stages(loops, w)

    def seen_by(part: str, record: Record) -> Record:
        """The record as a product's own functions know it."""
        names = {"weights": part, "packed": f"{part}_packed", "bias": f"{part}_bias"}
        fields = {name: record[field] for name, field in names.items() if field in record}
        return {**record, **dict.fromkeys(("z", "act", "up", "dup"), record["hidden"]), **fields}

    def down(record: Record) -> Record:
        return {**seen_by("down", record), "y": record["sums"], "adds": i64(0)}

    def pack(record: Record, e: ir.Value) -> None:
        for part, (packs, _) in products.items():
            packs(seen_by(part, record), e)
        pack_down(down(record), e)

    def chunk(record: Record, number: ir.Value) -> None:
        if parts.routing is not None:
            _route(loops, w, record, number, parts.routing)
        sort_chunk(w, record, number)
        for part, (_, multiplies) in products.items():
            multiplies(seen_by(part, record), number)
        add_up(down(record), number)
        if loops.paired or parts.start:
            _finish(loops, w, record, number, starts=parts.start)

    PREFILL.write(w, pack, loops.task(w, chunk))


def _tokens(w: Writer, record: Record, number: ir.Value) -> tuple[ir.Value, ir.Value]:
    """First and last token, plus one, of a chunk."""
    begin = w.mul(number, record["per_chunk"])
    return begin, w.minimum(w.add(begin, record["per_chunk"]), record["token_count"])


def _route(loops: Loops, w: Writer, record: Record, number: ir.Value, routing: Routing) -> None:
    """Score a chunk's tokens and choose their experts."""
    begin, end = _tokens(w, record, number)

    def tile(t: ir.Value, size: int) -> None:
        def some(e: ir.Value, count: int) -> None:
            rows, inputs = (
                [w.at(record[name], w.mul(w.add(first, i), loops.words_D)) for i in range(many)]
                for name, first, many in (("router", e, count), ("x", t, size))
            )
            bias = w.load(w.at(record["router_bias"], e), w.vector_of(count))
            for i, sums in enumerate(_dots(loops, w, inputs, rows)):
                place = w.add(w.mul(w.add(t, i), routing.experts), e)
                w.store(w.b.fadd(w.reduce_each(sums), bias), w.at(record["scores"], place))

        w.tiles(routing.experts, TILE, some)

    def choose(t: ir.Value) -> None:
        scores = w.at(record["scores"], w.mul(t, routing.experts))
        ids = w.at(record["ids"], w.mul(t, routing.chosen), I64)
        write_selection(w, scores, ids, routing.experts, routing.chosen, routing.mass)

    w.tiles(end, TILE, tile, start=begin)
    w.range(begin, end, 1, choose)


def _dots(loops: Loops, w: Writer, inputs: Values, rows: Values) -> list[Values]:
    """For each input its products with the rows, not added up yet, given their addresses."""

    def step(d: ir.Value, sums: Values) -> Values:
        left, right = ([w.load(w.at(address, d)) for address in each] for each in (inputs, rows))
        pairs = itertools.product(left, right)
        return [loops.multiply_add(w, *pair, total) for pair, total in zip(pairs, sums, strict=True)]

    zeros = [w.zero()] * (len(rows) * len(inputs))
    _, sums = w.loop(0, loops.words_D, loops.L, zeros, step)
    return [sums[first : first + len(rows)] for first in range(0, len(sums), len(rows))]


def _finish(loops: Loops, w: Writer, record: Record, number: ir.Value, *, starts: bool) -> None:
    """Write a chunk's rows of y from their sums."""
    begin, end = _tokens(w, record, number)

    def row(t: ir.Value) -> None:
        def vector(d: ir.Value) -> None:
            place = w.add(w.mul(t, loops.D), d)
            value = w.load(w.at(record["sums"], place))
            if starts:
                value = w.b.fadd(value, w.load(w.at(record["start"], d)))
            loops.store_z(w, value, loops.at_z(w, record["y"], place))

        w.range(0, loops.D, loops.L, vector)

    w.range(begin, end, 1, row)
