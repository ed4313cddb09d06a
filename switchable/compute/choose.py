"""The table of backends, and the one function that chooses among them.

A rule decides, and leaves one: a training run that is resumed must get the same bits, so a stopwatch must not choose.
On the CPU, `decode` for a few tokens without gradients; else `fused`, from 64 tokens on and for experts that are not so
large that a matrix library does as well; else `sorted` where the products are large enough to be worth its calls,
N · D · I multiplications of an expert with its N tokens; else `masked`. On CUDA `grouped_mm`; `triton` only by name,
until a figure from a GPU is there. What none of these can do is left to `reference`.

Shapes: T tokens, D d_model, E experts, F d_ff, I = F/E neurons per expert, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchable.compute.call import RELU_TYPES, Backend, ExpertCall
from switchable.compute.cpu.decode.compiled import MOST_TOKENS, has_code
from switchable.compute.cpu.decode.decode import DECODE
from switchable.compute.cpu.experts.fused import FUSED
from switchable.compute.cpu.limits import why_no_loops
from switchable.compute.cpu.sorted import SORTED
from switchable.compute.cuda.grouped_mm import GROUPED_MM
from switchable.compute.cuda.triton.path import TRITON
from switchable.compute.masked import MASKED
from switchable.compute.reference import REFERENCE
from switchable.errors import InputError, nearest

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (REFERENCE, FUSED, SORTED, DECODE, MASKED, GROUPED_MM, TRITON)
}
"""By name; `auto` stands for what `choose` says."""

FEWEST_FUSED = 64
"""Tokens from which `fused` is worth the reordering of its weights."""
THICK = 512
"""Neurons of an expert from which `sorted` is as fast as `fused` or faster; measured with D 256 to 1,024, E 4 to 16."""
WORTH_SORTING = 700_000
"""N · D · I, multiplications of an expert's product (N tokens of it on average), from which `sorted` beats `masked`.
Measured on 2 cores for D 128 to 1,024, E 8 to 64: the break-even lay between 500,000 and 800,000 from 16 tokens on."""
LARGEST_DECODE = 16
"""Tokens; above, `decode` is not asked where it has no compiled code."""


def expert_ffn(call: ExpertCall, backend: str = "auto") -> Tensor:
    """Apply to each token its own K experts and add them up.

    Args:
        call: what to compute.
        backend: a name in `BACKENDS`, or `"auto"`.

    Returns:
        y_TD, without the bias of the output projection.

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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def choose(call: ExpertCall) -> Backend:
    """Return the backend that `auto` is for a call."""
    return next((backend for backend in _wished(call) if backend.supports(call) is None), REFERENCE)


def _wished(call: ExpertCall) -> tuple[Backend, ...]:
    """Return the backends that are fastest for a call's sizes, best first, whether or not they can do it."""
    x_TD, experts, neurons = call.x_TD, call.num_experts, call.neurons
    if x_TD.is_cuda:
        return (GROUPED_MM,)
    (tokens, d_model), dtype = x_TD.shape, _compute_dtype(x_TD)
    compiled = has_code(d_model, experts, dtype, call.activation)
    if not call.learns and tokens <= (MOST_TOKENS if compiled else LARGEST_DECODE):
        return (SORTED,) if torch.is_autocast_enabled(x_TD.device.type) else (DECODE, MASKED)
    loops = call.activation in RELU_TYPES and why_no_loops(d_model, dtype) is None
    if tokens >= FEWEST_FUSED and neurons < THICK and loops:
        return (FUSED, SORTED)
    work = tokens * call.expert_ids_TK.shape[1] / experts * d_model * neurons
    return (SORTED,) if work >= WORTH_SORTING else (MASKED,)


def _compute_dtype(x_TD: Tensor) -> torch.dtype:
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
