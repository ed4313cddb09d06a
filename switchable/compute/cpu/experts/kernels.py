"""The loops of `fused`: products of an expert's tokens that read and write the tokens' rows where they lie.

    dot      z_p = epilogue(Wₑ · x_t)       for every sorted pair p = (token t, expert e); Wₑ is [I, D]
    scatter  y_t = Σ Wₑᵀ · z_p              over the pairs of a token
    weights  Gₑ = Σ z_p x_tᵀ                over the pairs of an expert: the gradient of Wₑ
    bias     gₑ = Σ z_p

A product keeps a tile of results in registers, for instance 8 tokens by 3 vectors of neurons, and walks through what
is summed over; a token's row is found through its index, so no row is ever copied. A matrix product library cannot do
that, and wants more than some 30 neurons per expert besides; these loops reach two thirds of the processor's rate from
8 neurons on. What they wait for otherwise is memory, so everything is asked for ahead of time: what is added to (y, G)
one tile, values and weights one expert. What a block of an expert's columns is read for again and again is copied
together once, by the tile that reads it first.

Tokens are taken in chunks whose rows stay in the core's own cache while all experts are applied to them. Every sum is
made in the order of experts or of tokens, whatever the chunks and threads: results do not depend on them in any bit.

Shapes: T tokens, D d_model, E experts, I neurons per expert, K experts per token, P = T·K sorted pairs, C chunks,
L lanes of a vector.
"""

from __future__ import annotations

from llvmlite import ir

from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import I32, Writer, whole

AHEAD = 8
"""Most rows between the one worked on and the one asked for from memory: so many places after the last one are read."""
PAIRS = ("tokens", "starts")
"""Fields of every record."""
POINT = 16
"""Binary digits after the point of a `Share`."""


class Loops:
    """Writes loops for one packing into a module: what the products have in common."""

    def __init__(self, module: ir.Module, packing: Packing):
        self.module, self.packing = module, packing
        self.D, self.I, self.L = packing.d_model, packing.neurons, packing.lanes

    def writer(self, name: str, arguments: list[ir.Type]) -> Writer:
        """Begin a function."""
        return Writer(self.module, name, arguments, wide=self.packing.wide, lanes=self.L)

    def row(self, w: Writer, x: ir.Value, tokens: ir.Value, i: ir.Value, further: int = 0) -> ir.Value:
        """The address of the row of an expert's token number i + further."""
        token = w.integer(w.at(tokens, w.b.add(i, whole(further)), I32))
        return w.at(x, w.b.mul(token, whole(self.D)))


class Share:
    """Where each step's share of so many numbers begins: what is needed next is asked for bit by bit.

    Args:
        w: writes a function; the share is worked out where it is made.
        numbers: per `steps` steps.
        steps: at least one is assumed.
    """

    def __init__(self, w: Writer, numbers: int, steps: ir.Value):
        self.w = w
        least = w.b.select(w.b.icmp_signed("<", steps, whole(1)), whole(1), steps)
        self.rate = w.b.sdiv(whole(numbers << POINT), least)

    def __call__(self, step: ir.Value) -> ir.Value:
        return self.w.b.ashr(self.w.b.mul(step, self.rate), whole(POINT))
