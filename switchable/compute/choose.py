"""The table of backends, and the one function that chooses among them.

A rule decides, and leaves one: a training run that is resumed must get the same bits, so a stopwatch must not choose.
On the CPU, `decode` for a few tokens without gradients; else `fused`, from 64 tokens on and for experts that are not so
large that a matrix library does as well (in bfloat16, if the processor multiplies it in pairs, from 16 on and for all;
gated ones for all, too); else `sorted`, and `reference` for gated ones, where the products are large enough to be worth
its calls, N · D · I multiplications of an expert with its N tokens; else `masked`. On CUDA `grouped_mm`; `triton` only
by name, until a figure from a GPU is there. What none of these can do is left to `reference`.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from switchable.compute.activations import RELU_TYPES
from switchable.compute.call import Backend, ExpertCall, autocasts, compute_dtype
from switchable.compute.cpu.decode.compiled import MOST_TOKENS, has_code
from switchable.compute.cpu.decode.decode import DECODE
from switchable.compute.cpu.experts.fused import FUSED
from switchable.compute.cpu.experts.packing import multiplied
from switchable.compute.cpu.limits import why_no_loops
from switchable.compute.cpu.llvm import this_machine
from switchable.compute.cpu.sorted import SORTED
from switchable.compute.cuda.grouped_mm import GROUPED_MM
from switchable.compute.cuda.triton.path import TRITON
from switchable.compute.eager import eager
from switchable.compute.reference import MASKED, REFERENCE
from switchable.errors import InputError, nearest

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (REFERENCE, FUSED, SORTED, DECODE, MASKED, GROUPED_MM, TRITON)
}
"""By name; `auto` stands for what `choose` says."""

FEWEST_FUSED = 64
"""Tokens from which `fused` is worth the reordering of its weights."""
FEWEST_PAIRED = {False: 16, True: 32}
"""The same where bfloat16 is multiplied in pairs, and if gradients are to be rounded to it, with weights of bfloat16;
measured with D 256 and 768, E 32 and 128, gated and not."""
THICK = 512
"""Neurons of an expert from which `sorted` is as fast as `fused` or faster; measured with D 256 to 1,024, E 4 to 16.
In pairs `fused` was faster up to 2,048, the most tried."""
THICK_UNPAIRED = 64
"""The same in bfloat16, if the processor has pairs for a library, and our loops have not: D or I do not fill them.
Measured with D 272 to 784."""
THICK_GATED = 256
"""The same where the FFN is gated: `reference` is then the other one. Everywhere else `fused` was twice as fast as it
in float32, and half as fast again in bfloat16, with up to 1,024 neurons, the most tried."""
WORTH_SORTING = 700_000
"""N · D · I, multiplications of an expert's product (N tokens of it on average), from which `sorted` beats `masked`.
Measured on 2 cores for D 128 to 1,024, E 8 to 64: the break-even lay between 500,000 and 800,000 from 16 tokens on."""
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
    why_not = BACKENDS[backend].supports(call)
    if why_not is not None:
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
    x_TD, experts, neurons = call.x_TD, call.num_experts, call.neurons
    if x_TD.is_cuda:
        return (GROUPED_MM,)
    (tokens, d_model), dtype = x_TD.shape, compute_dtype(call)
    compiled = dtype == torch.float32 and has_code(d_model, experts, dtype, call.activation)
    if not call.learns and tokens <= (MOST_TOKENS if compiled else LARGEST_DECODE.get(dtype, 16)):
        return (DECODE, MASKED)
    loops = call.activation in RELU_TYPES and why_no_loops(d_model, dtype) is None
    gated, machine = call.weights.gate_FD is not None, this_machine()
    fewest, thick = FEWEST_FUSED, math.inf if gated else THICK
    if machine is not None and machine.pairs and dtype == torch.bfloat16:
        paired = multiplied(d_model, neurons, dtype, machine) == dtype
        unpaired = THICK_GATED if gated else THICK_UNPAIRED
        rounded = call.learns and not autocasts(call)
        fewest, thick = (FEWEST_PAIRED[rounded], math.inf) if paired else (FEWEST_FUSED, unpaired)
    if loops and tokens >= fewest and neurons < thick:
        return (FUSED, SORTED)
    work = tokens * call.expert_ids_TK.shape[1] / experts * d_model * neurons
    return (SORTED,) if work >= WORTH_SORTING else (MASKED,)
