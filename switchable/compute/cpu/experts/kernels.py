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

Tokens are taken in chunks whose rows stay in the core's own cache while all experts are applied to them. Every sum is
made in the order of experts or of tokens, whatever the chunks and threads: no bit of a result depends on them.

Flow: `fused.py` (autograd) -> `library.py` (tensors) -> these loops, written by `dot.py`, `scatter.py`, `gradients.py`.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, P = T·K sorted pairs, C chunks,
L lanes of a vector.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import I32, Index, Writer, i64

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

    def writer(self, name: str, arguments: list[ir.Type]) -> Writer:
        """Begin a function."""
        return Writer(self.module, name, arguments, wide=self.packing.wide, lanes=self.L)

    def row(self, w: Writer, x: ir.Value, tokens: ir.Value, i: ir.Value, further: int = 0) -> ir.Value:
        """The address of the row of an expert's token number i + further."""
        token = w.integer(w.at(tokens, w.add(i, further), I32))
        return w.at(x, w.mul(token, self.D))


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
