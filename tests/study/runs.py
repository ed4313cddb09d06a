"""The settings of a small run, and what a study of it shows."""

from __future__ import annotations

from typing import Any

from switchable.study.pictures import pictures_of
from switchable.study.result import Study

SMALL: dict[str, Any] = {
    "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
    "data": {"vocab_size": 300},
    "train": {
        "steps": 20, "batch_size": 4, "sequence_length": 16, "log_every": 4, "eval_every": 10, "checkpoint_every": 10,
        "eval_tokens": 512, "threads": 1, "snapshots": 3, "probe_tokens": 256,
    },
    "switch": {
        "recipe": "early", "num_experts": 8, "experts_per_token": 3, "monitor_every": 3,
        "stability_threshold": 0.0, "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2,
    },
}  # fmt: skip


def names(study: Study) -> set[str]:
    return {picture.name for picture in pictures_of(study)}
