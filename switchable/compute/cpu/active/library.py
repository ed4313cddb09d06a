"""`active`'s loops, compiled for one width, and called on tensors.

Shapes as in `entries.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.active.entries import COLLECT, TRANSPOSE
from switchable.compute.cpu.active.kernels import DOT, MASS, SUM, TOTALS, WEIGHTS, ActiveKernels
from switchable.compute.cpu.code import Code
from switchable.compute.cpu.experts.packing import Packing
from switchable.compute.cpu.llvm import Machine
from switchable.compute.cpu.tasks import Scratch

CHUNK_TOKENS = 512
"""In a chunk: their rows should stay in the second-level cache, and a neuron's share of them pay for its own row."""
BLOCK_BYTES = 1 << 19
"""Of the rows of a block of neurons, which should stay there too."""

SCRATCH_BYTES = 1 << 28
"""Of dense products that exist at a time, unless a single chunk has more."""


@dataclass
class Entries:
    """The active entries of a matrix of activations (see `entries.py`)."""

    tokens: int
    width: int
    """F."""
    per_block: int
    base: Tensor
    """[C], int64."""
    starts: Tensor
    """[C, B·S + 1], int32."""
    neurons: Tensor
    """[A], int32."""
    values: Tensor
    """[A]."""

    @property
    def chunks(self) -> int:
        return len(self.base)

    @property
    def places(self) -> dict[str, Tensor | int]:
        """Fields that every loop over entries takes."""
        return {
            "per_chunk": CHUNK_TOKENS,
            "blocks": -(-self.width // self.per_block),
            "per_block": self.per_block,
            "neuron_count": self.width,
            "token_count": self.tokens,
            "base": self.base,
            "starts": self.starts,
            "neurons": self.neurons,
        }


@dataclass
class ByNeuron:
    """Entries in the order of their neurons."""

    entries: Entries
    firsts: Tensor
    """[C, F + 2], int32."""
    order: Tensor
    """[A], int32."""
    tokens: Tensor
    """[A], int32."""

    @property
    def places(self) -> dict[str, Tensor | int]:
        """Fields that every loop over neurons takes."""
        return {
            "chunks": self.entries.chunks,
            "neuron_count": self.entries.width,
            "base": self.entries.base,
            "firsts": self.firsts,
            "order": self.order,
            "tokens": self.tokens,
        }


class ActiveLibrary:
    """The compiled loops for one width and type."""

    def __init__(self, d_model: int, dtype: torch.dtype, machine: Machine):
        module = ir.Module("active")
        self.d_model, self.itemsize = d_model, dtype.itemsize
        self.sums = torch.promote_types(dtype, torch.float32)
        """Dtype of entries' values and of sums over entries."""
        ActiveKernels(module, Packing(d_model, 1, dtype, machine))
        self.code = Code(module, machine)
        self.scratch = Scratch()

    def collect(self, x_TD: Tensor, up_FD: Tensor, bias_F: Tensor | None) -> Entries:
        """Return the entries of x · upᵀ + b that are greater than zero (or no number).

        The dense products exist for as many chunks at a time as there are threads, if `SCRATCH_BYTES` allow.
        """
        tokens, width = len(x_TD), len(up_FD)
        per_block = max(1, min(width, BLOCK_BYTES // (self.d_model * self.itemsize)))
        chunks, blocks = -(-tokens // CHUNK_TOKENS), -(-width // per_block)
        room = SCRATCH_BYTES // (CHUNK_TOKENS * width * (self.itemsize + self.sums.itemsize + 4))
        together = max(1, min(chunks, torch.get_num_threads(), room))
        rows, found, values = (
            self.scratch(name, (together, CHUNK_TOKENS * width), dtype)
            for name, dtype in (("rows", x_TD.dtype), ("found", torch.int32), ("values", self.sums))
        )
        starts = torch.empty(chunks, blocks * CHUNK_TOKENS + 1, dtype=torch.int32)
        active_neurons, active_values, lengths = [found.new_empty(0)], [values.new_empty(0)], [0]
        for first in range(0, chunks, together):
            part = x_TD[first * CHUNK_TOKENS : (first + together) * CHUNK_TOKENS]
            out = rows.view(-1, width)[: len(part)]
            if bias_F is None:
                torch.mm(part, up_FD.T, out=out)
            else:
                torch.addmm(bias_F, part, up_FD.T, out=out)
            number = min(together, chunks - first)
            sizes = {"blocks": blocks, "per_block": per_block, "neuron_count": width, "token_count": tokens}
            memory = {"starts": starts, "neurons": found, "values": values, "rows": rows}
            COLLECT.run(
                self.code, "collect", number, per_chunk=CHUNK_TOKENS, first_chunk=first, **sizes, **memory
            )
            for c, count in enumerate(starts[first : first + number, -1].tolist()):
                active_neurons.append(found[c, :count].clone())
                active_values.append(values[c, :count].clone())
                lengths.append(count)
        return Entries(
            tokens=tokens,
            width=width,
            per_block=per_block,
            base=torch.tensor(lengths).cumsum(0)[:-1].contiguous(),
            starts=starts,
            neurons=torch.cat(active_neurons),
            values=torch.cat(active_values),
        )

    def sum(self, entries: Entries, values: Tensor, weights_FD: Tensor) -> Tensor:
        """Return y_TD, each token's entries times the neurons' rows."""
        y_TD = values.new_empty(entries.tokens, self.d_model)
        SUM.run(self.code, "sum", entries.chunks, **entries.places, values=values, weights=weights_FD, y=y_TD)
        return y_TD

    def dot(self, entries: Entries, x_TD: Tensor, weights_FD: Tensor) -> Tensor:
        """Return z_A, the product of each entry's token and neuron."""
        z_A = torch.empty_like(entries.values)
        DOT.run(self.code, "dot", entries.chunks, **entries.places, values=z_A, weights=weights_FD, x=x_TD)
        return z_A

    def by_neuron(self, entries: Entries) -> ByNeuron:
        """Return the entries in the order of their neurons."""
        firsts = torch.empty(entries.chunks, entries.width + 2, dtype=torch.int32)
        order, tokens = torch.empty_like(entries.neurons), torch.empty_like(entries.neurons)
        written = {"firsts": firsts, "order": order, "tokens": tokens}
        TRANSPOSE.run(self.code, "transpose", entries.chunks, **entries.places, **written)
        return ByNeuron(entries, firsts, order, tokens)

    def weight_gradient(self, sorted_: ByNeuron, values: Tensor, x_TD: Tensor) -> Tensor:
        """Return Σ s · xᵀ over each neuron's entries, [F, D]."""
        gradient_FD = values.new_zeros(sorted_.entries.width, self.d_model)
        tasks = min(torch.get_num_threads(), len(gradient_FD))
        memory = {"values": values, "x": x_TD, "gradient": gradient_FD}
        WEIGHTS.run(self.code, "weights", tasks, **sorted_.places, **memory)
        return gradient_FD

    def bias_gradient(self, sorted_: ByNeuron, values: Tensor) -> Tensor:
        """Return Σ s over each neuron's entries, [F]."""
        gradient_F = values.new_zeros(sorted_.entries.width)
        tasks = min(torch.get_num_threads(), len(gradient_F))
        TOTALS.run(self.code, "totals", tasks, **sorted_.places, values=values, gradient=gradient_F)
        return gradient_F

    def mass(self, entries: Entries, values: Tensor, norms_F: Tensor, groups: int) -> Tensor:
        """Return Σ s · n over each token's entries of each group of neurons, [T, G]; G divides F."""
        mass_TG = values.new_empty(entries.tokens, groups)
        memory = {"values": values, "norms": norms_F, "mass": mass_TG}
        MASS.run(self.code, "mass", entries.chunks, **entries.places, groups=groups, **memory)
        return mass_TG


@functools.cache
def active_library(d_model: int, dtype: torch.dtype, machine: Machine) -> ActiveLibrary:
    """Return the loops for a width, compiled when first asked for; `skips_idle_neurons` must hold."""
    return ActiveLibrary(d_model, dtype, machine)
