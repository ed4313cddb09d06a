"""`fused`'s loops, compiled for one shape of expert, and called on tensors.

Flow: `fused.py` (autograd) -> here -> `kernels.py` (what the loops do).

Shapes as in `kernels.py`; F = E·I neurons.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.code import Code
from switchable.compute.cpu.experts.dot import BY_CHUNK, DOT, write_dot
from switchable.compute.cpu.experts.gradients import BIAS, WEIGHTS, write_bias, write_weights
from switchable.compute.cpu.experts.kernels import AHEAD, Loops
from switchable.compute.cpu.experts.packing import Packing, multiplied
from switchable.compute.cpu.experts.scatter import SCATTER, write_scatter
from switchable.compute.cpu.experts.sort import SORT, write_sort
from switchable.compute.cpu.llvm import Machine
from switchable.compute.cpu.tasks import Scratch

SMALLEST_CHUNK = 16
"""With fewer tokens, putting weights in order takes longer than multiplying."""
WRITERS = {"scatter": write_scatter, "weights": write_weights, "bias": write_bias, "sort": write_sort}
"""Of all loops but "dot", and those of `prefill.py`."""


class Pairs(NamedTuple):
    """The (token, expert) pairs of a batch in the order of `sort.py`, int32."""

    tokens_P: Tensor
    """Token of each place; `AHEAD` zeros follow, whose rows may be prefetched."""
    starts: Tensor
    """First place of each expert in each chunk, then of its pairs without one: C · (E + 1) numbers."""
    experts: int
    chunks: int
    per_chunk: int
    """Tokens."""

    @property
    def fields(self) -> dict[str, Tensor | int]:
        """Those of every loop's record."""
        return {"experts": self.experts, "tokens": self.tokens_P, "starts": self.starts}


class Library:
    """The loops for one packing. Matrices that are given to them may have any strides."""

    def __init__(self, packing: Packing):
        self.packing, self.scratch = packing, Scratch()
        self.sums = torch.promote_types(packing.dtype, torch.float32)
        """Dtype of sums over experts or tokens."""
        self.code = Code(self._written, packing.machine)

    def _written(self, name: str) -> ir.Module:
        loops = Loops(ir.Module(name), self.packing)
        WRITERS.get(name, functools.partial(write_dot, name=name))(loops)
        return loops.module

    def chunks(self, tokens: int) -> tuple[int, int]:
        """Return how many tokens a chunk has, and how many chunks there are."""
        per_thread = -(-tokens // torch.get_num_threads())
        per_chunk = min(self.packing.chunk_tokens, max(per_thread, SMALLEST_CHUNK))
        return per_chunk, -(-tokens // per_chunk)

    def sort(self, ids_TK: Tensor, num_experts: int) -> Pairs:
        """Sort expert ids, int64 and all in [0, num_experts]; the last one is no expert."""
        tokens, chosen = ids_TK.shape
        per_chunk, chunks = self.chunks(tokens)
        tokens_P, starts, cursors = (
            torch.zeros(size, dtype=torch.int32, device="cpu")
            for size in (tokens * chosen + AHEAD, *2 * [chunks * (num_experts + 1)])
        )
        numbers = {"experts": num_experts, "chosen": chosen, "per_chunk": per_chunk, "token_count": tokens}
        memory = {"ids": ids_TK.contiguous(), "tokens": tokens_P, "starts": starts, "cursors": cursors}
        SORT.run(self.code, "sort", chunks, **numbers, **memory)
        return Pairs(tokens_P, starts, num_experts, chunks, per_chunk)

    def project(
        self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, pairs: Pairs, *, relu: bool
    ) -> Tensor:
        """Return Wₑ · x_t + bₑ, or its ReLU, of each pair's token and expert, [P, I]; x and b are contiguous."""
        name = f"dot{'' if bias_F is None else '_bias'}{'_relu' if relu else ''}"
        z_PI = x_TD.new_empty(len(pairs.tokens_P) - AHEAD, self.packing.neurons)
        self._dot(name, x_TD, weight_FD, pairs, z=z_PI, bias=bias_F)
        return z_PI

    def project_back(
        self,
        dy_TD: Tensor,
        down_FD: Tensor,
        act_PI: Tensor,
        up_PI: Tensor | None,
        pairs: Pairs,
        *,
        squared: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the entrance and of `up`'s results, which stand until the next call.

        With h' = downₑ · dy_t these are h' ⊙ act', and None; in a gated FFN h' ⊙ up ⊙ act', and h' ⊙ act.

        Args:
            dy_TD: the gradient of y, contiguous.
            down_FD: the weights.
            act_PI: what ReLU gave.
            up_PI: what the activations were multiplied with, in a gated FFN.
            pairs: from `sort`.
            squared: whether the activation is ReLU's square.
        """
        name = f"dot{'' if up_PI is None else '_gated'}{'_slope' if squared else '_mask'}"
        dz_PI = self.scratch("dz", act_PI.shape, act_PI.dtype)
        dup_PI = None if up_PI is None else self.scratch("dup", act_PI.shape, act_PI.dtype)
        self._dot(name, dy_TD, down_FD, pairs, z=dz_PI, act=act_PI, up=up_PI, dup=dup_PI)
        return dz_PI, dup_PI

    def _dot(self, name: str, x_TD: Tensor, weight_FD: Tensor, pairs: Pairs, **memory: Tensor | None) -> None:
        own, once = self.packing, pairs.chunks > torch.get_num_threads()
        places = pairs.experts if once else pairs.chunks
        packed = self.scratch("packed", (places, own.vectors, own.steps, own.lanes), self.sums)
        memory |= {"x": x_TD, "weights": weight_FD.contiguous(), "packed": packed}
        tasks = (pairs.experts if once else 0, pairs.chunks)
        DOT.run(self.code, name if once else name + BY_CHUNK, *tasks, **pairs.fields, **memory)

    def scatter(
        self, z_PI: Tensor, weight_FD: Tensor, pairs: Pairs, tokens: int, onto_TD: Tensor | None = None
    ) -> Tensor:
        """Return the sums of what each token's experts make of their values, [T, D], added to `onto_TD` in place."""
        y_TD = onto_TD
        if y_TD is None:
            y_TD = z_PI.new_empty(tokens, self.packing.d_model, dtype=self.sums)
        packed = weight_FD = weight_FD.contiguous()
        if self.packing.amx:
            shape = (pairs.experts, self.packing.scatter_words, y_TD.shape[1])
            packed = self.scratch("packed", shape, self.sums)
        numbers = {"per_chunk": pairs.per_chunk, "token_count": tokens, "adds": onto_TD is not None}
        memory = {"y": y_TD, "weights": weight_FD, "packed": packed, "z": z_PI}
        tasks = (pairs.experts if self.packing.amx else 0, pairs.chunks)
        SCATTER.run(self.code, "scatter", *tasks, **pairs.fields, **numbers, **memory)
        return y_TD

    def weight_gradient(self, z_PI: Tensor, x_TD: Tensor, pairs: Pairs) -> Tensor:
        """Return Σ z · xᵀ over each expert's pairs, [F, D]."""
        own = self.packing
        total_FD = x_TD.new_empty(pairs.experts * own.neurons, own.d_model, dtype=self.sums)
        if not pairs.chunks:
            return total_FD.zero_()
        blocks = own.d_model // (own.gradient_columns * own.lanes)
        tasks = min(torch.get_num_threads(), blocks)
        memory = {"x": x_TD, "gradient": total_FD, "z": z_PI}
        if own.terms > 1:
            memory["words"] = self.scratch("words", (tasks, own.gradient_words), self.sums)
        if own.amx:
            memory["sums"] = self.scratch("gradient", (tasks, own.gradient_sums), self.sums)
        WEIGHTS.run(self.code, "weights", tasks, **pairs.fields, chunks=pairs.chunks, **memory)
        return total_FD

    def bias_gradient(self, z_PI: Tensor, pairs: Pairs) -> Tensor:
        """Return Σ z over each expert's pairs, [F]."""
        total_F = z_PI.new_zeros(pairs.experts * self.packing.neurons, dtype=self.sums)
        memory = {"gradient": total_F, "z": z_PI}
        BIAS.run(self.code, "bias", pairs.experts, **pairs.fields, chunks=pairs.chunks, **memory)
        return total_F


@functools.cache
def library(d_model: int, neurons: int, dtype: torch.dtype, machine: Machine) -> Library:
    """Return the loops for a shape; `why_no_loops` must have returned None.

    What they multiply, `packing.dtype`, need not be `dtype`, in which a call is computed.
    """
    return Library(Packing(d_model, neurons, multiplied(d_model, neurons, dtype, machine), machine))
