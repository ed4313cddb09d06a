"""Causal language modelling: predict each token from those before it.

The labels are the inputs; `transformers` shifts them by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CausalLM:
    """Windows as they are."""

    window: int
    """Tokens in a sequence."""
    name: ClassVar[str] = "causal"
    unit: ClassVar[str] = "nats per token"

    def __call__(
        self,
        ids_BW: npt.NDArray[np.int64],
        rows_B: npt.NDArray[np.int64],  # noqa: ARG002 - the same call for every objective
        seed: int,  # noqa: ARG002
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Return `input_ids` [B, W] and `labels`, the same array."""
        return {"input_ids": ids_BW, "labels": ids_BW}
