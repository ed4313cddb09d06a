"""`active`'s loops, compiled for one width, and called on tensors.

Shapes as in `entries.py`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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


class Entries(NamedTuple):
    """The active entries of a matrix of activations (see `entries.py`)."""

    tokens: int
    width: int
    """F."""
    base: Tensor
    """[C], int64."""
    neurons: Tensor
    """[A], int32."""
    values: Tensor
    """[A]."""
    fields: dict[str, Tensor | int]
    """Those of every loop over entries."""

    @property
    def chunks(self) -> int:
        return len(self.base)


class ByNeuron(NamedTuple):
    """Entries in the order of their neurons."""

    width: int
    """F."""
    fields: dict[str, Tensor | int]
    """Those of every loop over neurons."""


class ActiveLibrary:
    """The compiled loops for one width and type."""

    def __init__(self, d_model: int, dtype: torch.dtype, machine: Machine):
        self.d_model, self.itemsize = d_model, dtype.itemsize
        self.packing = Packing(d_model, 1, dtype, machine)
        self.sums = torch.promote_types(dtype, torch.float32)
        """Dtype of entries' values and of sums over entries."""
        self.code, self.scratch = Code(self._written, machine), Scratch()

    def _written(self, name: str) -> ir.Module:
        kernels = ActiveKernels(ir.Module(name), self.packing)
        kernels.write[name]()
        return kernels.module

    def collect(self, x_TD: Tensor, up_FD: Tensor, bias_F: Tensor | None) -> Entries:
        """Return the entries of x · upᵀ + b that are greater than zero (or no number).

        The dense products exist for as many chunks at a time as there are threads, if `SCRATCH_BYTES` allow.
        """
        tokens, width = len(x_TD), len(up_FD)
        per_block = max(1, min(width, BLOCK_BYTES // (self.d_model * self.itemsize)))
        chunks, blocks = -(-tokens // CHUNK_TOKENS), -(-width // per_block)
        sizes = {"per_chunk": CHUNK_TOKENS, "blocks": blocks, "per_block": per_block}
        sizes |= {"neuron_count": width, "token_count": tokens}
        room = SCRATCH_BYTES // (CHUNK_TOKENS * width * (self.itemsize + self.sums.itemsize + 4))
        together = max(1, min(chunks, torch.get_num_threads(), room))
        rows, found, values = (
            self.scratch(name, (together, CHUNK_TOKENS * width), dtype)
            for name, dtype in (("rows", x_TD.dtype), ("found", torch.int32), ("values", self.sums))
        )
        starts = torch.empty(chunks, blocks * CHUNK_TOKENS + 1, dtype=torch.int32, device="cpu")
        active_neurons, active_values, lengths = [found.new_empty(0)], [values.new_empty(0)], [0]
        for first in range(0, chunks, together):
            part = x_TD[first * CHUNK_TOKENS : (first + together) * CHUNK_TOKENS]
            out = rows.view(-1, width)[: len(part)]
            if bias_F is None:
                torch.mm(part, up_FD.T, out=out)
            else:
                torch.addmm(bias_F, part, up_FD.T, out=out)
            number = min(together, chunks - first)
            memory = {"starts": starts, "neurons": found, "values": values, "rows": rows}
            COLLECT.run(self.code, "collect", number, first_chunk=first, **sizes, **memory)
            for c, count in enumerate(starts[first : first + number, -1].tolist()):
                active_neurons.append(found[c, :count].clone())
                active_values.append(values[c, :count].clone())
                lengths.append(count)
        base = torch.tensor(lengths, device="cpu").cumsum(0)[:-1].contiguous()
        neurons = torch.cat(active_neurons)
        memory = {"base": base, "starts": starts, "neurons": neurons}
        return Entries(tokens, width, base, neurons, torch.cat(active_values), {**sizes, **memory})

    def sum(self, entries: Entries, values: Tensor, weights_FD: Tensor) -> Tensor:
        """Return y_TD, each token's entries times the neurons' rows."""
        y_TD = values.new_empty(entries.tokens, self.d_model)
        SUM.run(self.code, "sum", entries.chunks, **entries.fields, values=values, weights=weights_FD, y=y_TD)
        return y_TD

    def dot(self, entries: Entries, x_TD: Tensor, weights_FD: Tensor) -> Tensor:
        """Return z_A, the product of each entry's token and neuron."""
        z_A = torch.empty_like(entries.values)
        DOT.run(self.code, "dot", entries.chunks, **entries.fields, values=z_A, weights=weights_FD, x=x_TD)
        return z_A

    def by_neuron(self, entries: Entries) -> ByNeuron:
        """Return the entries in the order of their neurons."""
        written = {
            "firsts": torch.empty(entries.chunks, entries.width + 2, dtype=torch.int32, device="cpu"),
            "order": torch.empty_like(entries.neurons),
            "tokens": torch.empty_like(entries.neurons),
        }
        TRANSPOSE.run(self.code, "transpose", entries.chunks, **entries.fields, **written)
        sizes = {"chunks": entries.chunks, "neuron_count": entries.width}
        return ByNeuron(entries.width, {**sizes, "base": entries.base, **written})

    def weight_gradient(self, by_neuron: ByNeuron, values: Tensor, x_TD: Tensor) -> Tensor:
        """Return Σ s · xᵀ over each neuron's entries, [F, D]."""
        gradient_FD = values.new_zeros(by_neuron.width, self.d_model)
        tasks = min(torch.get_num_threads(), by_neuron.width)
        memory = {"values": values, "x": x_TD, "gradient": gradient_FD}
        WEIGHTS.run(self.code, "weights", tasks, **by_neuron.fields, **memory)
        return gradient_FD

    def bias_gradient(self, by_neuron: ByNeuron, values: Tensor) -> Tensor:
        """Return Σ s over each neuron's entries, [F]."""
        gradient_F = values.new_zeros(by_neuron.width)
        tasks = min(torch.get_num_threads(), by_neuron.width)
        TOTALS.run(self.code, "totals", tasks, **by_neuron.fields, values=values, gradient=gradient_F)
        return gradient_F

    def mass(self, entries: Entries, values: Tensor, norms_F: Tensor, groups: int) -> Tensor:
        """Return Σ s · n over each token's entries of each group of neurons, [T, G]; G divides F."""
        mass_TG = values.new_empty(entries.tokens, groups)
        memory = {"values": values, "norms": norms_F, "mass": mass_TG}
        MASS.run(self.code, "mass", entries.chunks, **entries.fields, groups=groups, **memory)
        return mass_TG


@functools.cache
def active_library(d_model: int, dtype: torch.dtype, machine: Machine) -> ActiveLibrary:
    """Return the loops for a width, compiled when first asked for; `skips_idle_neurons` must hold."""
    return ActiveLibrary(d_model, dtype, machine)
