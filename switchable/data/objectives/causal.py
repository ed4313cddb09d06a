"""Causal language modelling: predict each token from those before it.

The labels are the inputs; `transformers` shifts them by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from switchable.data.arrays import Ints


@dataclass(frozen=True)
class CausalLM:
    """Windows as they are."""

    window: int
    """Tokens in a sequence."""
    name: ClassVar[str] = "causal"
    unit: ClassVar[str] = "nats per token"

    def __call__(
        self,
        ids_BW: Ints,
        rows_B: Ints,  # noqa: ARG002 - the same call for every objective
        seed: int,  # noqa: ARG002
    ) -> dict[str, Ints]:
        """Return `input_ids` [B, W] and `labels`, the same array."""
        return {"input_ids": ids_BW, "labels": ids_BW}
