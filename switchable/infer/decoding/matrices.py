"""A model's matrices in the width that decoding wants, each multiplied in the way that is fastest for so many tokens.

    few tokens    our own loops (`compute/cpu/decode/linear.py`), float32 sums, weights of any width
    many          torch's product, in float32 or bfloat16; 8 bits are widened first, into memory that all share

Shapes: T tokens, N rows, D numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from switchable.compute.cpu.decode.linear import LinearCall
from switchable.compute.cpu.decode.norm import Norm
from switchable.compute.cpu.decode.rows import quantised
from switchable.compute.cpu.limits import has_pairs, why_no_loops
from switchable.compute.cpu.tasks import Scratch

WIDTHS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Of weights, by name."""
MOST_COMPILED = 32
"""Tokens up to which our loops are faster than torch; measured on AVX-512 with D 256 to 3,072, one thread."""


class Quantised(NamedTuple):
    """A matrix as it lies in memory."""

    rows_ND: Tensor
    scale_N: Tensor | None = None
    """Of int8."""

    def wide(self, dtype: torch.dtype, scratch: Scratch, name: str = "wide") -> Tensor:
        """Return it in float32 or bfloat16, in memory that the next call for this name overwrites."""
        if self.scale_N is None:
            return self.rows_ND.to(dtype)
        out_ND = scratch(name, self.rows_ND.shape, dtype)
        return torch.mul(self.rows_ND, self.scale_N.to(dtype).unsqueeze(1), out=out_ND)


Stacked = Sequence[tuple[Tensor, bool]]
"""Parameters below one another, each [N, D], or [D, N] and told so."""
Stored = Callable[[str, Stacked], Quantised]
"""Reads a matrix in 8 bits: by its name, or by the parameters that it is made of, which need no memory."""


class Matrix:
    """y = norm(x) · Wᵀ + bias.

    Args:
        weight: W.
        bias_N: float32.
        many: the dtype in which many tokens are multiplied.
        scratch: for what is widened.
        norm: of x; None: it is multiplied as it is.
    """

    def __init__(
        self,
        weight: Quantised,
        bias_N: Tensor | None,
        many: torch.dtype,
        scratch: Scratch,
        norm: Norm | None = None,
    ):
        self.weight, self.bias_N, self.many, self.scratch, self.norm = weight, bias_N, many, scratch, norm
        self.bias_many = None if bias_N is None else bias_N.to(many)
        self.most = MOST_COMPILED if why_no_loops(weight.rows_ND.shape[1], torch.float32) is None else 0
        self.calls: dict[tuple[int, int, bool], LinearCall] = {}

    def __call__(self, x_TD: Tensor, add_TN: Tensor | None = None) -> Tensor:
        """Return y, and `add_TN` added to it: float32 for few tokens, else what many are multiplied in."""
        tokens = x_TD.shape[0]  # its length takes ten times as long
        if tokens > self.most:
            x_TD = x_TD if self.norm is None else self.norm(x_TD)
            y_TN = linear(x_TD.to(self.many), self.weight.wide(self.many, self.scratch), self.bias_many)
            return y_TN if add_TN is None else add_TN + y_TN
        return self.call_for(tokens, adds=add_TN is not None)(x_TD, add_TN)

    def call_for(self, tokens: int, *, adds: bool = False) -> LinearCall:
        """Return the call of our loops for so many tokens, at most `most`."""
        key = (tokens, torch.get_num_threads(), adds)
        if (call := self.calls.get(key)) is None:
            call = LinearCall(tokens, *self.weight, self.bias_N, adds=adds, norm=self.norm)
            self.calls[key] = call
        return call


class Matrices:
    """Takes a model's matrices over, in a width.

    float32 and bfloat16 that are laid out well already stay where they are; others get a new place, to which the
    model's parameters point then. In 8 bits the model's own are let go: it can no longer be called.

    Args:
        width: a key of `WIDTHS`.
        stored: reads matrices in 8 bits from a file.
    """

    def __init__(self, width: str, stored: Stored | None = None):
        self.dtype, self.stored, self.scratch = WIDTHS[width], stored, Scratch()
        narrow = width == "bfloat16" or (width == "int8" and has_pairs())
        self.many = torch.bfloat16 if narrow else torch.float32
        """The dtype in which many tokens are multiplied, and of keys and values."""
        self.taken: dict[str, Quantised] = {}

    def rows(self, name: str, parts: Stacked) -> Quantised:
        """Return a matrix made of some parameters."""
        self.taken[name] = found = self._rows(parts) if self.stored is None else self.stored(name, parts)
        return found

    def _rows(self, parts: Stacked) -> Quantised:
        rows = [parameter.detach().t() if turned else parameter.detach() for parameter, turned in parts]
        if self.dtype == torch.int8:
            found = in_8_bits(rows)
            for parameter, _ in parts:
                parameter.data = parameter.data.new_empty(0)
            return found
        whole = _joined(rows).to(self.dtype).contiguous()
        for (parameter, turned), own in zip(
            parts, torch.split(whole, [len(own) for own in rows]), strict=True
        ):
            parameter.data = own.t() if turned else own
        return Quantised(whole)

    def matrix(self, name: str, *modules: nn.Linear, norm: Norm | None = None) -> Matrix:
        """Return what some projections are together, of what a norm gives."""
        weight = self.rows(name, [(each.weight, isinstance(each, Conv1D)) for each in modules])
        biases = [each.bias for each in modules]
        bias = None if biases[0] is None else torch.cat([numbers(each) for each in biases])
        return Matrix(weight, bias, self.many, self.scratch, norm)


def in_8_bits(rows: Iterable[Tensor]) -> Quantised:
    """Return matrices below one another, rounded."""
    rows_ND, scale_N = zip(*map(quantised, rows), strict=True)
    return Quantised(_joined(rows_ND), _joined(scale_N))


def _joined(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def numbers(parameter: Tensor) -> Tensor:
    """Return a vector's numbers in float32, where they may be read without its parameter."""
    return parameter.detach().float().contiguous()
