"""What the loops of `fused` have in common: products of an expert's tokens with its weights, without copying a row.

    dot      z_p = epilogue(Wₑ · x_t)       for every sorted pair p = (token t, expert e); Wₑ is [I, D]
    scatter  y_t = Σ Wₑᵀ · z_p              over the pairs of a token
    weights  Gₑ = Σ z_p x_tᵀ                over the pairs of an expert: the gradient of Wₑ
    bias     gₑ = Σ z_p

A product keeps a tile of results in registers, for instance 8 tokens by 3 vectors of neurons, and walks through what
is summed over. A token's row is found through its index, so no row is ever copied. A matrix library cannot do that,
and wants more than some 30 neurons per expert besides; these loops reach two thirds of the processor's rate from 8
neurons on.

The rest of the time they would wait for memory, so everything is prefetched: what is added to (y, G) one tile ahead,
values and weights one expert ahead. Columns of a block that several tiles read are cached side by side by the first.

In bfloat16 a *word* is two neighbouring terms of a sum, 32 bits, which one instruction multiplies and adds: two numbers
of a token, of a neuron, or of two tokens; AMX's instruction does so with tiles of words (`amx_products.py`), which then
takes the place of the loops over registers and their prefetches. Else a word is one number. What a product writes is
rounded to bfloat16, unless it is a sum over experts or over tokens: those stay float32.

Tokens are taken in chunks whose rows stay in the core's own cache while all experts are applied to them. Every sum is
made in the order of experts or of tokens, whatever the chunks and threads: no bit of a result depends on them.

Flow: `fused.py` (autograd) -> `library.py` (tensors) -> these loops, written by `dot.py`, `scatter.py`, `gradients.py`;
without gradients `fused.py` -> `prefill.py`, a call of several of them.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, P = T·K sorted pairs, C chunks,
L lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import BFLOAT16, I32, POINTER, Index, Writer, i64
from switchable.compute.cpu.tasks import Record, Stage

AHEAD = 8
"""Most rows between the one worked on and the one prefetched: `tokens` must have so many places after the last one."""
PAIRS = ("tokens", "starts")
"""Fields of every record."""
FRACTION_BITS = 16
"""Of the fixed-point numbers of a `Pace`."""


class Loops:
    """A module that loops for one packing are written into.

    Args:
        module: gets the functions.
        packing: the sizes of an expert.
    """

    def __init__(self, module: ir.Module, packing: Packing):
        self.module, self.packing = module, packing
        self.D, self.I, self.L = packing.d_model, packing.neurons, packing.lanes
        self.paired, self.amx = packing.terms == 2, packing.amx
        self.words_D, self.words_I = self.D // packing.terms, self.I // packing.terms

    @property
    def tails(self) -> list[int]:
        """Lanes of a vector and of the smaller ones that cover what is left of a row."""
        return [self.L >> half for half in range(self.L.bit_length())]

    def writer(self, name: str, arguments: Sequence[ir.Type] = (POINTER,)) -> Writer:
        """Begin a function: of tasks, if it has no other arguments than the address of a record."""
        return Writer(self.module, name, arguments, wide=self.packing.dtype == torch.float64, lanes=self.L)

    def task(self, w: Writer, body: Stage) -> Stage:
        """A task whose products may be AMX's: it configures the tiles, and leaves the thread without them."""
        amx = self.amx
        if amx is None:
            return body

        def with_tiles(record: Record, number: ir.Value) -> None:
            amx.configure(w.b)
            body(record, number)
            amx.release(w.b)

        return with_tiles

    def row(
        self, w: Writer, x: ir.Value, tokens: ir.Value, i: ir.Value, further: Index = 0, *, words: int
    ) -> ir.Value:
        """The address of the row of an expert's token number i + further, if rows have so many words."""
        token = w.integer(w.at(tokens, w.add(i, further), I32))
        return w.at(x, w.mul(token, words))

    def multiply_add(self, w: Writer, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """left · right + total, word by word."""
        if not self.paired:
            return w.fma(left, right, total)
        pairs = ir.VectorType(BFLOAT16, 2 * self.L)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.L}"
        return w.call(name, w.vector, total, w.b.bitcast(left, pairs), w.b.bitcast(right, pairs))

    def at_z(self, w: Writer, z: ir.Value, index: Index) -> ir.Value:
        """The address of a number that a product has written."""
        return w.at(z, index, BFLOAT16 if self.paired else None)

    def load_z(self, w: Writer, address: ir.Value, kind: Any) -> ir.Value:
        """Read a vector of such numbers."""
        if not self.paired:
            return w.load(address, kind)
        return w.b.fpext(w.b.load(address, align=2, typ=ir.VectorType(BFLOAT16, kind.count)), kind)

    def store_z(self, w: Writer, value: ir.Value, address: ir.Value) -> None:
        """Write a vector of such numbers."""
        if self.paired:
            w.b.store(w.b.fptrunc(value, ir.VectorType(BFLOAT16, value.type.count)), address, align=2)
        else:
            w.store(value, address)

    def pair_up(
        self, w: Writer, first: ir.Value, second: ir.Value, lanes: int, single: ir.Value | None = None
    ) -> ir.Value:
        """Read bfloat16s at two addresses and return words of one of each, of the first and zero if `single`."""
        kind = ir.VectorType(BFLOAT16, lanes)
        left, right = (w.b.load(address, align=2, typ=kind) for address in (first, second))
        if single is not None:
            right = w.b.select(single, ir.Constant(kind, None), right)
        pairs = w.shuffle(left, [lane + side for lane in range(lanes) for side in (0, lanes)], right)
        return w.b.bitcast(pairs, w.vector_of(lanes))

    def words(self, w: Writer, rows: Sequence[ir.Value], vectors: int) -> list[ir.Value]:
        """Read neighbouring vectors of words whose terms stand in so many rows, one or two."""
        if not self.paired:
            return w.vectors(rows[0], vectors)
        pairs = [[self.at_z(w, row, v * self.L) for row in rows] for v in range(vectors)]
        return [self.pair_up(w, first, second, self.L) for first, second in pairs]


class Pace:
    """Where each step's part of a prefetch begins, if `numbers` numbers are prefetched in the course of `steps` steps.

    A prefetch in one go would fill the processor's few line buffers and stall the loop.
    """

    def __init__(self, w: Writer, numbers: int, steps: Index):
        self.w = w
        at_least_one = w.b.select(w.compare(steps, "<", 1), i64(1), i64(steps))
        self.rate = w.div(numbers << FRACTION_BITS, at_least_one)  # divided once: a division takes long

    def __call__(self, step: ir.Value) -> ir.Value:
        return self.w.b.ashr(self.w.mul(step, self.rate), i64(FRACTION_BITS))
