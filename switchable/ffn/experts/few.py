"""A few tokens without gradients, in one call of compiled code: what `decode` does where it can.

Reading weights is all that costs time then, and calls: a layer of a small model takes less time than ten operations
of torch. So one function does it all, the router's scores, its choice, the chosen experts' `up`, and of `down` the rows
of neurons that fire:

    s_t = R · x_t + r;  e_t1..K = the K highest;  h_t = relu(up_e · x_t + b);  y_t = c + Σ_{h_ti ≠ 0} h_ti · down_i

Experts are the outer loop, so that one that several tokens chose is read once. With several threads, and enough to
read, experts are tasks, then ranges of columns of `down`.

ReLU and squared ReLU, float32, gates of 1, up to 63 tokens.

Shapes: T tokens, D d_model, E experts, I neurons per expert, F = E·I, K experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.ffn.experts.cpu import FAST_ACTIVATIONS
from switchable.ffn.experts.llvm import (
    I64,
    POINTER,
    Code,
    Machine,
    Values,
    Writer,
    compile_module,
    this_machine,
    whole,
)
from switchable.ffn.experts.selection import MOST_EXPERTS, write_selection
from switchable.ffn.experts.tasks import Record, Tasks
from switchable.ffn.experts.weights import FFNWeights

MOST_TOKENS = 63
"""A set of tokens is a word of 64 bits."""
WORTH_THREADS = 2**20
"""Bytes of chosen experts from which several threads are faster than one."""
ROWS = (8, 4, 2, 1)
"""Rows of weights that are multiplied with a token side by side."""
FEW = Tasks(
    numbers=("tokens",),
    addresses=("x", "router", "router_bias", "scores", "ids", "chosen", "up", "bias", "hidden", "down", "start", "y"),
)  # fmt: skip
"""`scores` [T, E], `chosen` [E] (the set of tokens of each expert) and `hidden` [T, F] are scratch; so is `ids` [T, K]
where the router chooses. `start` [D] is what y begins with."""


@dataclass(frozen=True)
class Sizes:
    """What code is compiled for."""

    d_model: int
    neurons: int
    experts: int
    chosen: int
    squared: bool
    bias: bool
    start: bool

    @property
    def d_ff(self) -> int:
        return self.experts * self.neurons


def serves(d_model: int, num_experts: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether there is code for layers of these sizes."""
    machine = this_machine()
    return (
        machine is not None
        and dtype == torch.float32
        and activation in FAST_ACTIVATIONS
        and d_model % (machine.vector_bytes // 4) == 0
        and num_experts <= MOST_EXPERTS
    )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def few_tokens(
    x_TD: Tensor,
    weights: FFNWeights,
    choice: Tensor | tuple[Tensor, Tensor],
    num_experts: int,
    experts_per_token: int,
    *,
    activation: str,
    start_D: Tensor | None = None,
) -> Tensor | None:
    """Return y_TD without gradients, or None where there is no code for the case.

    Args:
        x_TD: one row per token.
        weights: of an FFN that is not gated.
        choice: ids_TK, int64, in [0, num_experts); or the weight [E, D] and bias [E] of a router that chooses.
        num_experts: E.
        experts_per_token: K.
        activation: its name.
        start_D: what is added to every row: the bias of the output projection.
    """
    (tokens, d_model), d_ff = x_TD.shape, len(weights.up_FD)
    router = choice if isinstance(choice, tuple) else ()
    tensors = (x_TD, weights.up_FD, weights.down_FD, weights.up_bias_F, start_D, *router)
    if (
        not 0 < tokens <= MOST_TOKENS
        or not serves(d_model, num_experts, x_TD.dtype, activation)
        or not all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    ):
        return None
    code = _code(
        d_model,
        d_ff // num_experts,
        num_experts,
        experts_per_token,
        activation == "relu2",
        weights.up_bias_F is not None,
        start_D is not None,
        cast(Machine, this_machine()),
    )
    y_TD = torch.empty_like(x_TD)
    ids_TK = (
        torch.empty(tokens, experts_per_token, dtype=torch.int64)
        if router
        else cast(Tensor, choice).contiguous()
    )
    fields: dict[str, Tensor | int | None] = {
        "tokens": tokens,
        "x": x_TD,
        "router": router[0] if router else 0,
        "router_bias": router[1] if router else 0,
        "scores": torch.empty(tokens * num_experts),
        "ids": ids_TK,
        "chosen": torch.empty(num_experts, dtype=torch.int64),
        "up": weights.up_FD,
        "bias": weights.up_bias_F,
        "hidden": torch.empty(tokens * d_ff),
        "down": weights.down_FD,
        "start": start_D,
        "y": y_TD,
    }
    threads = torch.get_num_threads()
    visits = min(tokens * experts_per_token, num_experts)
    if threads == 1 or visits * (d_ff // num_experts) * d_model * 8 < WORTH_THREADS:
        FEW.run(code, "routed" if router else "given", 1, **fields)
    else:
        FEW.run(code, "choose" if router else "gather", 1, **fields)
        FEW.run(code, "read", num_experts, **fields)
        FEW.run(code, "write", threads, **fields)
    return y_TD


@functools.cache
def _code(
    d_model: int,
    neurons: int,
    experts: int,
    chosen: int,
    squared: bool,
    bias: bool,
    start: bool,
    machine: Machine,
) -> Code:
    module = ir.Module("few")
    _Writers(module, Sizes(d_model, neurons, experts, chosen, squared, bias, start), machine)
    return compile_module(module, machine)


class _Writers:
    """Writes the functions: each entry is made of the parts below."""

    def __init__(self, module: ir.Module, sizes: Sizes, machine: Machine):
        self.module, self.sizes, self.lanes = module, sizes, machine.vector_bytes // 4
        self.scores = self._write_dots("scores", sizes.experts, lambda w, total, bias: w.b.fadd(total, bias))
        self.hidden = self._write_dots("hidden", sizes.neurons, self._activation)
        self._write_entry("routed", self._route, self._gather, self._read_all, self._write_all)
        self._write_entry("given", self._gather, self._read_all, self._write_all)
        self._write_entry("choose", self._route, self._gather)
        self._write_entry("gather", self._gather)
        self._write_entry("read", self._read)
        self._write_entry("write", self._write_range)

    def _write_entry(self, name: str, *parts: Callable[[Writer, Record, ir.Value], None]) -> None:
        w = Writer(self.module, name, [POINTER], wide=False, lanes=self.lanes)

        def body(record: Record, task: ir.Value) -> None:
            for part in parts:
                part(w, record, task)

        FEW.write(w, body)

    def _activation(self, w: Writer, total: ir.Value, bias: ir.Value) -> ir.Value:
        total = w.b.fadd(total, bias) if self.sizes.bias else total
        zero = w.zero(w.number)
        total = w.b.select(w.b.fcmp_ordered("<", total, zero), zero, total)
        return w.b.fmul(total, total) if self.sizes.squared else total

    def _write_dots(
        self, name: str, count: int, finish: Callable[[Writer, ir.Value, ir.Value], ir.Value]
    ) -> ir.Function:
        """out_r = finish(matrix_r · x, bias_r) for the rows of a matrix."""
        w = Writer(self.module, f"{name}_dots", [POINTER] * 4, wide=False, lanes=self.lanes)
        matrix, x, bias, out = w.arguments
        width = self.sizes.d_model

        def tile(r: ir.Value, rows: int) -> None:
            first = w.at(matrix, w.b.mul(r, whole(width)))

            def step(d: ir.Value, sums: Values) -> Values:
                inputs = w.load(w.at(x, d))
                own = w.at(first, d)
                return [
                    w.multiply_add(w.load(w.at(own, whole(row * width))), inputs, total)
                    for row, total in enumerate(sums)
                ]

            _, sums = w.loop(whole(0), whole(width), whole(self.lanes), [w.zero()] * rows, step)
            for row, total in enumerate(sums):
                place = w.b.add(r, whole(row))
                value = (
                    w.load(w.at(bias, place), w.number)
                    if name == "scores" or self.sizes.bias
                    else w.zero(w.number)
                )
                w.store(finish(w, w.total(total), value), w.at(out, place))

        w.tiles(whole(count), ROWS, tile)
        w.b.ret_void()
        return w.function

    def _route(self, w: Writer, record: Record, _: ir.Value) -> None:
        experts, chosen = self.sizes.experts, self.sizes.chosen

        def token(t: ir.Value) -> None:
            scores = w.at(record["scores"], w.b.mul(t, whole(experts)))
            x = w.at(record["x"], w.b.mul(t, whole(self.sizes.d_model)))
            w.b.call(self.scores, [record["router"], x, record["router_bias"], scores])
            ids = w.at(record["ids"], w.b.mul(t, whole(chosen)), I64)
            write_selection(w, scores, ids, experts, chosen)

        w.each(record["tokens"], token)

    def _gather(self, w: Writer, record: Record, _: ir.Value) -> None:
        """Fill `chosen`."""
        b = w.b
        w.each(whole(self.sizes.experts), lambda e: b.store(whole(0), w.at(record["chosen"], e, I64)))

        def token(t: ir.Value) -> None:
            bit, first = b.shl(whole(1), t), b.mul(t, whole(self.sizes.chosen))

            def pair(k: ir.Value) -> None:
                expert = w.integer(w.at(record["ids"], b.add(first, k), I64), I64)
                place = w.at(record["chosen"], expert, I64)
                b.store(b.or_(w.integer(place, I64), bit), place)

            w.each(whole(self.sizes.chosen), pair)

        w.each(record["tokens"], token)

    def _each_token(self, w: Writer, record: Record, e: ir.Value, body: Callable[[ir.Value], None]) -> None:
        """body(token) for those that chose an expert."""
        b, f = w.b, w.function
        left = w.integer(w.at(record["chosen"], e, I64), I64)
        before = b.block
        head, work, after = (f.append_basic_block(name) for name in ("left", "token", "none"))
        b.branch(head)
        b.position_at_end(head)
        tokens = b.phi(I64)
        tokens.add_incoming(left, before)
        b.cbranch(b.icmp_signed("==", tokens, whole(0)), after, work)
        b.position_at_end(work)
        body(b.cttz(tokens, ir.Constant(ir.IntType(1), 1)))
        tokens.add_incoming(b.and_(tokens, b.sub(tokens, whole(1))), b.block)
        b.branch(head)
        b.position_at_end(after)

    def _read(self, w: Writer, record: Record, e: ir.Value) -> None:
        """Fill `hidden` for one expert."""
        b, sizes = w.b, self.sizes
        neuron = b.mul(e, whole(sizes.neurons))
        up, bias = w.at(record["up"], b.mul(neuron, whole(sizes.d_model))), w.at(record["bias"], neuron)

        def token(t: ir.Value) -> None:
            x = w.at(record["x"], b.mul(t, whole(sizes.d_model)))
            out = w.at(record["hidden"], b.add(b.mul(t, whole(sizes.d_ff)), neuron))
            b.call(self.hidden, [up, x, bias, out])

        self._each_token(w, record, e, token)

    def _read_all(self, w: Writer, record: Record, _: ir.Value) -> None:
        w.each(whole(self.sizes.experts), lambda e: self._read(w, record, e))

    def _write_range(self, w: Writer, record: Record, task: ir.Value) -> None:
        b, blocks = w.b, whole(self.sizes.d_model // self.lanes)
        first, after = (
            b.mul(b.sdiv(b.mul(blocks, end), record["tasks"]), whole(self.lanes))
            for end in (task, b.add(task, whole(1)))
        )
        self._columns(w, record, first, b.sdiv(b.sub(after, first), whole(self.lanes)))

    def _write_all(self, w: Writer, record: Record, _: ir.Value) -> None:
        self._columns(w, record, whole(0), whole(self.sizes.d_model // self.lanes))

    def _columns(self, w: Writer, record: Record, first: ir.Value, vectors: ir.Value) -> None:
        """Write some columns of y."""
        b, sizes = w.b, self.sizes

        def row(field: str, number: ir.Value) -> ir.Value:
            return w.at(record[field], b.add(b.mul(number, whole(sizes.d_model)), first))

        def begin(t: ir.Value) -> None:
            def copy(v: ir.Value) -> None:
                place = b.mul(v, whole(self.lanes))
                value = w.load(w.at(row("start", whole(0)), place)) if sizes.start else w.zero()
                w.store(value, w.at(row("y", t), place))

            w.each(vectors, copy)

        w.each(record["tokens"], begin)

        def neuron(number: ir.Value, e: ir.Value) -> None:
            def token(t: ir.Value) -> None:
                value = w.load(w.at(record["hidden"], b.add(b.mul(t, whole(sizes.d_ff)), number)), w.number)
                with b.if_then(b.fcmp_unordered("!=", value, w.zero(w.number))):
                    repeated = w.spread(value)

                    def add(v: ir.Value) -> None:
                        place = b.mul(v, whole(self.lanes))
                        own = w.at(row("y", t), place)
                        column = w.load(w.at(row("down", number), place))
                        w.store(w.multiply_add(repeated, column, w.load(own)), own)

                    w.each(vectors, add)

            self._each_token(w, record, e, token)

        def expert(e: ir.Value) -> None:
            none = b.icmp_signed("==", w.integer(w.at(record["chosen"], e, I64), I64), whole(0))
            with b.if_then(b.not_(none)):
                base = b.mul(e, whole(sizes.neurons))
                w.each(whole(sizes.neurons), lambda j: neuron(b.add(base, j), e))

        w.each(whole(sizes.experts), expert)
