"""The settings of `switchable convert`."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.errors import InputError
from switchable.options import check, option


@dataclass(frozen=True)
class AdaptConfig:
    """How an existing checkpoint is cut into experts, its routers are calibrated, and both are measured."""

    num_experts: int = option(
        128,
        "experts per FFN; divides d_ff. Finer ones catch more, coarser ones compute faster",
        least=1,
        metavar="E",
    )
    experts_per_token: int | None = option(
        None, "experts that each token computes in sparse mode; none: a quarter of them", least=1, metavar="K"
    )
    structure: str = option(
        "coactivation",
        "what neurons are grouped by: weights = rows of the input projection; coactivation = firing together on the "
        "text; mixed = both",
        choices=("weights", "coactivation", "mixed"),
        metavar="NAME",
    )
    structure_tokens: int = option(8192, "tokens that show what fires together", least=1, metavar="TOKENS")
    calibration_tokens: int = option(200_000, "tokens that the routers learn from", least=1, metavar="TOKENS")
    router_learning_rate: float = option(
        1e-2, "peak learning rate of the routers (AdamW)", above=0, most=1000, metavar="LR"
    )
    eval_tokens: int = option(32_768, "validation tokens on which all is measured", least=1, metavar="TOKENS")
    sequence_length: int = option(
        256, "tokens per sequence, at most the model's positions", least=2, metavar="TOKENS"
    )
    batch_size: int = option(8, "sequences at a time", least=1, metavar="N")
    max_activation_ratio: float = option(
        0.3,
        "largest activation ratio at which a layer counts as sparse; others stay dense in sparse mode",
        above=0,
        most=1,
        metavar="RATIO",
    )
    relufy: int = option(
        0,
        "optimizer steps to train on with ReLU in place of the activation, before anything else; 0: as it is",
        least=0,
        metavar="STEPS",
    )
    relufy_learning_rate: float = option(
        1e-4, "peak learning rate of these steps (AdamW)", above=0, most=1000, metavar="LR"
    )
    keep_activation: bool = option(False, "convert a model whose activations are not sparse all the same")
    seed: int = option(0, "random seed of clustering and data order", least=0, most=2**32 - 1, metavar="N")
    threads: int | None = option(None, "CPU threads; none: torch's choice", least=1, most=1024, metavar="N")
    device: str | None = option(None, "torch device; none: cuda if there is one, else cpu", metavar="NAME")

    def __post_init__(self) -> None:
        check(self)
        if self.relufy and self.keep_activation:
            raise InputError("relufy changes the activation and keep_activation keeps it; give one of them")
        if self.default_k > self.num_experts:
            raise InputError(
                f"experts_per_token={self.default_k} is not possible with num_experts={self.num_experts}; "
                f"use 1 to {self.num_experts}"
            )

    @property
    def default_k(self) -> int:
        """K in sparse mode."""
        return max(1, self.num_experts // 4) if self.experts_per_token is None else self.experts_per_token
