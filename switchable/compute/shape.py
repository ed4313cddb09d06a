"""One problem of expert compute, and which sparse ways come into question for it.

On the CPU a rule decides, and leaves one: a training run that is resumed must get the same bits, so a stopwatch must
not choose. `decode` for a few tokens without gradients; else `fused`, from 64 tokens on and for experts that are not so
large that a matrix library does as well; else `sorted` where the products are large enough to be worth its calls,
N · D · I multiplications of an expert with its N tokens; else `masked`.

Shapes: T tokens, D d_model, E experts, F d_ff, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from switchable.compute.cpu.decode.compiled import MOST_TOKENS, serves
from switchable.compute.cpu.experts.fused import has_loops

CUDA_CANDIDATES = ("triton", "torch_grouped_mm")
"""Sparse ways that are timed on CUDA."""
FEWEST_FUSED = 64
"""Tokens from which `fused` is worth the reordering of its weights."""
THICK = 512
"""Neurons of an expert from which `sorted` is as fast as `fused` or faster; measured with D 256 to 1,024, E 4 to 16."""
WORTH_SORTING = 700_000
"""N · D · I, multiplications of an expert's product (N tokens of it on average), from which `sorted` beats `masked`.
Measured on 2 cores for D 128 to 1,024, E 8 to 64: the break-even lay between 500,000 and 800,000 from 16 tokens on."""
LARGEST = 4096
"""Tokens; ratios no longer change above."""
LARGEST_DECODE = 16
"""Tokens; above, `decode` is not asked where it has no compiled code."""


@dataclass(frozen=True)
class Shape:
    """One problem."""

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    experts_per_token: int
    activation: str = "relu"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = True
    """Forward and backward; else the forward alone, without gradients."""

    @property
    def key(self) -> str:
        """Its name in the table."""
        passes = "train" if self.training else "infer"
        return (
            f"{self.device} {str(self.dtype).removeprefix('torch.')} {self.activation} {passes} D={self.d_model} "
            f"F={self.d_ff} E={self.num_experts} K={self.experts_per_token} T={self.tokens}"
        )

    @property
    def measured_at(self) -> tuple[Shape, ...]:
        """The same with the one or two powers of two next to its tokens."""
        exponent = max(min(self.tokens, LARGEST), 1).bit_length() - 1
        above = min(2**exponent if self.tokens == 2**exponent else 2 ** (exponent + 1), LARGEST)
        return tuple(replace(self, tokens=tokens) for tokens in sorted({2**exponent, above}))


def candidates(shape: Shape) -> tuple[str, ...]:
    """The sparse ways that come into question for a shape on its device."""
    if shape.device == "cuda":
        return CUDA_CANDIDATES
    compiled = serves(shape.d_model, shape.num_experts, shape.dtype, shape.activation)
    if not shape.training and shape.tokens <= (MOST_TOKENS if compiled else LARGEST_DECODE):
        return ("decode",)
    neurons = shape.d_ff // shape.num_experts
    if (
        shape.tokens >= FEWEST_FUSED
        and neurons < THICK
        and has_loops(shape.d_model, neurons, shape.dtype, shape.activation)
    ):
        return ("fused",)
    mean_rows = shape.tokens * shape.experts_per_token / shape.num_experts
    work = mean_rows * shape.d_model * neurons
    return ("sorted",) if work >= WORTH_SORTING else ("masked",)
