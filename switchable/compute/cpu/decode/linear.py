"""A linear map of a few tokens in one call of compiled code, with weights of any width.

    y_t = scale ⊙ (W · norm(x_t)) + bias + start_t

A task is a range of rows. A row is read once for all tokens that are multiplied side by side, at most `TOKENS[0]`, and
then comes from the cache for the others.

Shapes: T tokens, N rows of a matrix, D numbers in each.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.code import Code
from switchable.compute.cpu.decode.norm import Norm, NormKind, write_norm
from switchable.compute.cpu.decode.rows import Rows
from switchable.compute.cpu.llvm import POINTER, Machine, Writer, this_machine
from switchable.compute.cpu.tasks import Record, Run, Tasks, floats

ROWS, TOKENS = (4, 2, 1), (4, 2, 1)
"""Rows of weights, and tokens, that are multiplied side by side."""
TASK_BYTES = 2**16
"""Of weights in a task, at least."""
TASKS_PER_THREAD = 8
"""At most: the threads need not be equally fast."""
LINEAR = Tasks(
    numbers=("tokens", "rows", "width"),
    addresses=("x", "norm", "norm_bias", "normed", "weight", "scale", "bias", "start", "y"),
    stages=2,
)
"""With a norm one task writes `normed` [T, D] first."""


class LinearCall:
    """y = W · x for a fixed number of tokens, everything looked up but x; for one Python thread at a time.

    Args:
        tokens: T.
        weight_ND: float32, bfloat16 or int8, contiguous; D must fill vectors (`limits.why_no_loops`).
        scale_N: of the rows of int8 weights.
        bias_N: float32.
        adds: whether a call gets a `start` [T, N], to which it is added.
        norm: of x, before it is multiplied.
    """

    def __init__(
        self,
        tokens: int,
        weight_ND: Tensor,
        scale_N: Tensor | None,
        bias_N: Tensor | None,
        adds: bool = False,
        norm: Norm | None = None,
    ):
        rows, width = weight_ND.shape
        machine = cast(Machine, this_machine())
        in_line = Rows(weight_ND.dtype, width, machine.vector_bytes // 4).in_line
        kind = None if norm is None else norm.kind
        code = _code(weight_ND.dtype, in_line, bias_N is not None, adds, kind, machine)
        threads = torch.get_num_threads()
        size = weight_ND.numel() * weight_ND.itemsize
        count = 1 if threads == 1 else max(1, min(size // TASK_BYTES, threads * TASKS_PER_THREAD))
        sizes = {"tokens": tokens, "rows": rows, "width": width}
        self.memory = {"weight": weight_ND, "scale": scale_N, "bias": bias_N}
        if norm is not None:
            self.memory |= {**norm.fields, "normed": floats(tokens, width)}
        tasks = (count,) if norm is None else (1, count)
        self.run, self.shape = Run(LINEAR, code, "linear", *tasks, **sizes, **self.memory), (tokens, rows)
        self.x, self.start, self.y = (self.run.places[name] for name in ("x", "start", "y"))

    def __call__(self, x_TD: Tensor, start_TN: Tensor | None = None) -> Tensor:
        """Return y_TN; all float32 and contiguous."""
        y_TN = floats(self.shape)
        self.told(x_TD, y_TN, start_TN)()
        return y_TN

    def told(self, x_TD: Tensor, y_TN: Tensor, start_TN: Tensor | None = None) -> Run:
        """Return what writes y."""
        record = self.run.record
        record[self.x], record[self.y] = x_TD.data_ptr(), y_TN.data_ptr()
        if start_TN is not None:
            record[self.start] = start_TN.data_ptr()
        return self.run


@functools.cache
def _code(
    dtype: torch.dtype, in_line: int, bias: bool, adds: bool, norm: NormKind | None, machine: Machine
) -> Code:
    module, lanes = ir.Module("linear"), machine.vector_bytes // 4
    w = Writer(module, "linear", [POINTER], wide=False, lanes=lanes)
    rows = Rows(dtype, lanes * in_line, lanes)
    parts = [name for name, there in (("bias", bias), ("start", adds)) if there]

    def finish(record: Record, totals: ir.Value, n: ir.Value, place: ir.Value) -> None:
        if rows.scaled:
            totals = w.b.fmul(totals, w.load(w.at(record["scale"], n), totals.type))
        for name in parts:
            address = w.at(record[name], n if name == "bias" else place)
            totals = w.b.fadd(totals, w.load(address, totals.type))
        w.store(totals, w.at(record["y"], place))

    def stage(record: Record, task: ir.Value) -> None:
        first, after = w.share(record["rows"], task, record["tasks" if norm is None else "tasks1"])

        def tile(n: ir.Value, count: int) -> None:
            numbers = (w.mul(w.add(n, r), record["width"]) for r in range(2 * count))
            places = [rows.at(w, record["weight"], number) for number in numbers]

            def side_by_side(t: ir.Value, tokens: int) -> None:
                ts = [w.add(t, k) for k in range(tokens)]
                x = record["x" if norm is None else "normed"]
                inputs = [w.at(x, w.mul(t, record["width"])) for t in ts]
                sums = rows.dots(w, places[:count], places[count:], inputs, record["width"])
                for t, own in zip(ts, sums, strict=True):
                    finish(record, w.reduce_each(own), n, w.add(w.mul(t, record["rows"]), n))

            w.tiles(record["tokens"], TOKENS, side_by_side)

        w.tiles(after, ROWS, tile, start=first)

    def normalise(record: Record, _: ir.Value) -> None:
        given = [record[name] for name in ("x", "norm", "norm_bias")]
        write_norm(w, cast(NormKind, norm), record["tokens"], given, record["normed"], record["width"])

    LINEAR.write(w, *([] if norm is None else [normalise]), stage)
    return Code.of(module, "linear", machine)
