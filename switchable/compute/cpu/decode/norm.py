"""LayerNorm and RMSNorm, as what a call of compiled code does to its input first.

    y = (x - mean) / sqrt(mean((x - mean)²) + ε) ⊙ weight + bias           RMSNorm: the mean counts as 0

A call of its own takes longer than the norm of a few tokens of a small model.

Shapes: T tokens, D numbers in each.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from switchable.compute.cpu.llvm import Index, Values, Writer


class NormKind(NamedTuple):
    """What code is compiled for."""

    eps: float
    is_rms: bool
    has_bias: bool


class Norm:
    """A norm's numbers, float32 and contiguous.

    Args:
        weight_D: what is multiplied with.
        bias_D: what is added, of a LayerNorm that does.
        eps: what is added to the variance.
        is_rms: whether it leaves the mean where it is.
    """

    def __init__(self, weight_D: Tensor, bias_D: Tensor | None, eps: float, *, is_rms: bool):
        self.weight, self.bias = weight_D, bias_D
        self.kind = NormKind(eps, is_rms, bias_D is not None)

    @property
    def fields(self) -> dict[str, Tensor | None]:
        """Those of a call's record."""
        return {"norm": self.weight, "norm_bias": self.bias}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of the last dimension, in x's dtype, by torch."""
        if self.kind.is_rms:
            return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.kind.eps)
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.kind.eps)


def write_norm(w: Writer, kind: NormKind, tokens: Index, given: Values, out: ir.Value, width: Index) -> None:
    """Write the norms of rows; `given` are the addresses of x, weight and bias."""
    x, weight, bias = given
    count = w.b.sitofp(w.add(width, 0), w.number)

    def summed(row: ir.Value, mean: ir.Value | None, *, squares: bool) -> ir.Value:
        def step(d: ir.Value, total: Values) -> Values:
            value = w.load(w.at(row, d))
            if mean is not None:
                value = w.b.fsub(value, mean)
            return [w.fma(value, value, total[0]) if squares else w.b.fadd(total[0], value)]

        return w.reduce_add(w.loop(0, width, w.lanes, [w.zero()], step)[1][0])

    def token(t: ir.Value) -> None:
        row, target = (w.at(address, w.mul(t, width)) for address in (x, out))
        mean = None
        if not kind.is_rms:
            mean = w.broadcast(w.b.fdiv(summed(row, None, squares=False), count), w.lanes)
        variance = w.b.fdiv(summed(row, mean, squares=True), count)
        root = w.call("llvm.sqrt.f32", w.number, w.b.fadd(variance, ir.Constant(w.number, kind.eps)))
        scale = w.broadcast(w.b.fdiv(ir.Constant(w.number, 1.0), root), w.lanes)

        def vector(d: ir.Value) -> None:
            value = w.load(w.at(row, d))
            if mean is not None:
                value = w.b.fsub(value, mean)
            value = w.b.fmul(w.b.fmul(value, scale), w.load(w.at(weight, d)))
            if kind.has_bias:
                value = w.b.fadd(value, w.load(w.at(bias, d)))
            w.store(value, w.at(target, d))

        w.range(0, width, w.lanes, vector)

    w.each(tokens, token)
