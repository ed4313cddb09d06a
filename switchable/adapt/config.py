"""The settings of `switchable convert`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from switchable.errors import InputError


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True)
class AdaptConfig:
    """How an existing checkpoint is cut into experts, its routers are calibrated, and both are measured."""

    num_experts: int = _option(
        128, "experts per FFN; divides d_ff. Finer ones catch more, coarser ones compute faster"
    )
    experts_per_token: int | None = _option(
        None, "experts that each token computes in sparse mode; default: a quarter of them"
    )
    structure: str = _option(
        "coactivation",
        "what neurons are grouped by: weights = rows of the input projection; coactivation = firing together on the "
        "text; mixed = both",
        choices=("weights", "coactivation", "mixed"),
    )
    structure_tokens: int = _option(8192, "tokens on which it is seen which neurons fire together")
    calibration_tokens: int = _option(200_000, "tokens that the routers learn from")
    router_learning_rate: float = _option(1e-2, "peak learning rate of the routers (AdamW)")
    eval_tokens: int = _option(32_768, "validation tokens on which everything is measured")
    sequence_length: int = _option(256, "tokens per sequence, at most the model's positions")
    batch_size: int = _option(8, "sequences at a time")
    max_activation_ratio: float = _option(
        0.3, "largest activation ratio at which a layer counts as sparse; others stay dense in sparse mode"
    )
    relufy: int = _option(
        0,
        "optimizer steps to train on with ReLU in place of the activation, before anything else; 0: as it is",
    )
    relufy_learning_rate: float = _option(1e-4, "peak learning rate of these steps (AdamW)")
    keep_activation: bool = _option(False, "convert a model whose activations are not sparse all the same")
    seed: int = _option(0, "random seed of clustering and data order")
    threads: int | None = _option(None, "CPU threads; default: torch's choice")
    device: str | None = _option(None, "torch device; default: cuda if there is one, else cpu")

    def __post_init__(self) -> None:
        for name in (
            *("num_experts", "structure_tokens", "calibration_tokens", "eval_tokens", "sequence_length"),
            "batch_size",
        ):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name}={getattr(self, name)} is out of range; use a whole number of at least 1"
                )
        if self.relufy < 0:
            raise InputError(f"relufy={self.relufy} is out of range; give the number of steps, 0 or more")
        if self.relufy and self.keep_activation:
            raise InputError("relufy changes the activation and keep_activation keeps it; give one of them")
        for name in ("router_learning_rate", "relufy_learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} is out of range; use a positive number")
        if not 0 < self.max_activation_ratio <= 1:
            raise InputError(
                f"max_activation_ratio={self.max_activation_ratio} is out of range; use a number from 0 to 1"
            )
        if not 1 <= self.default_k <= self.num_experts:
            raise InputError(
                f"experts_per_token={self.default_k} is not possible with num_experts={self.num_experts}; "
                f"use 1 to {self.num_experts}"
            )

    @property
    def default_k(self) -> int:
        """K in sparse mode."""
        return max(1, self.num_experts // 4) if self.experts_per_token is None else self.experts_per_token
