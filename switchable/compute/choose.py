"""The table of backends, and the one function that chooses among them.

A rule decides, and leaves one: a training run that is resumed must get the same bits, so a stopwatch must not choose.
On the CPU, `decode` for a few tokens without gradients; else `fused`, in training from 16 tokens on, and from 64 where
it has to copy weights into rows. What it cannot do is left to `reference` where the products are large enough to be
worth its calls, N · D · I multiplications of an expert with its N tokens; else to `masked`. On CUDA `grouped_mm`;
`triton` only by name, until a figure from a GPU is there.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchable.compute.call import Backend, ExpertCall, compute_dtype
from switchable.compute.cpu.decode.compiled import FEW_TOKENS, has_code
from switchable.compute.cpu.decode.decode import DECODE
from switchable.compute.cpu.decode.rows import NUMBERS
from switchable.compute.cpu.experts.fused import FUSED
from switchable.compute.cuda.grouped_mm import GROUPED_MM
from switchable.compute.cuda.triton.path import TRITON
from switchable.compute.eager import eager
from switchable.compute.reference import MASKED, REFERENCE
from switchable.errors import InputError, nearest

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (REFERENCE, FUSED, DECODE, MASKED, GROUPED_MM, TRITON)
}
"""By name; `auto` stands for what `choose` says."""

FEWEST_FUSED = {True: 16, False: 1}
"""Tokens from which `fused` is faster than `masked`, with gradients and without, if each neuron's weights are a row;
measured with D 128 to 1,024, E 8 to 128, both precisions; one token in bfloat16 with D 256 and 768."""
FEWEST_COPIED = 64
"""The same where they are not, as `nn.Linear` stores `down`: 32 or 64, with D 256 and 768."""
WORTH_LOOPING = 1_000_000
"""N · D · I, multiplications of an expert's product (N tokens of it on average), from which `reference` beats `masked`:
200,000 to 1,500,000, with D 100 to 500, E 8 and 32."""
LARGEST_DECODE = {torch.bfloat16: 1}
"""Tokens; above, `decode` is not asked where it has no compiled code. 16 in other types: the fewer bytes all neurons
have, the sooner reading them is faster than finding some."""


def expert_ffn(call: ExpertCall, backend: str = "auto") -> Tensor:
    """Apply to each token its own K experts and add them up, by the backend of a name, or the one that `choose` says.

    Returns y_TD, without the bias of the output projection.

    Raises:
        InputError: an unknown backend, or one that cannot do this call.
    """
    if backend == "auto":
        chosen: Backend = choose(call)
        return chosen.run(call)
    check_backend(backend)
    if (why_not := BACKENDS[backend].supports(call)) is not None:
        raise InputError(f"backend {backend!r} {why_not}; use 'auto', which takes {choose(call).name!r} here")
    return BACKENDS[backend].run(call)


def check_backend(name: str) -> None:
    """Raise InputError if there is no backend of that name."""
    if name not in BACKENDS and name != "auto":
        known = ("auto", *BACKENDS)
        raise InputError(
            f"backend {name!r} is not known; use one of {', '.join(known)}{nearest(name, known)}"
        )


@eager
def choose(call: ExpertCall) -> Backend:
    """Return the backend that `auto` is for a call."""
    return next((backend for backend in _wished(call) if backend.supports(call) is None), REFERENCE)


def _wished(call: ExpertCall) -> tuple[Backend, ...]:
    """Return the backends that are fastest for a call's sizes, best first, whether or not they can do it."""
    x_TD, experts = call.x_TD, call.num_experts
    if x_TD.is_cuda:
        return (GROUPED_MM,)
    (tokens, d_model), dtype = x_TD.shape, compute_dtype(call)
    learns, decodes = call.learns, False
    if tokens <= FEW_TOKENS and not learns:
        compiled = dtype in NUMBERS and has_code(d_model, experts, dtype, call.activation)
        decodes = compiled or tokens <= LARGEST_DECODE.get(dtype, 16)
    work = tokens * call.expert_ids_TK.shape[1] / experts * d_model * call.neurons
    rest = REFERENCE if work >= WORTH_LOOPING else MASKED
    in_rows = all(matrix.is_contiguous() for matrix in call.weights.tensors)
    fused = tokens >= (FEWEST_FUSED[learns] if in_rows else FEWEST_COPIED)
    return (*[DECODE] * decodes, *[FUSED] * fused, rest)
