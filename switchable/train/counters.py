"""Where a run stands and what it has cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from switchable import ranks


@dataclass
class Counters:
    """What a run adds up; saved with every checkpoint."""

    data: str = ""  # checksum of the training tokens
    steps: int = 0
    """Optimizer steps done; the data position too, since a step's batch is a function of its number."""
    sparse_steps: int = 0
    flops: float = 0.0  # FLOPs so far, measurements included
    flops_dense: float = 0.0  # FLOPs of dense steps
    flops_sparse: float = 0.0  # FLOPs of sparse steps
    seconds_dense: float = 0.0  # wall-clock of dense steps
    seconds_sparse: float = 0.0  # wall-clock of sparse steps
    seconds_measure: float = 0.0  # wall-clock of measuring, clustering and regrouping
    seconds_other: float = 0.0  # wall-clock of validation and saving
    cpu_seconds: float = 0.0
    """CPU time of all steps and measurements, all threads together: on a busy machine a fairer clock."""
    window_loss: float = 0.0  # sum of the losses (nats per token) since the last train line
    window_steps: int = 0
    window_sparse: int = 0
    window_seconds: float = 0.0
    window_ways: list[str] = field(default_factory=list)
    """Per layer, how it multiplied in each of these steps: the first letter of dense, active or sparse."""
    ran_with: list[dict[str, Any]] = field(default_factory=list)
    """What it was trained with: threads, jobs at a time on the machine, device; one entry unless that changed."""

    def note_machine(self, jobs: int, device: torch.device) -> None:
        """Note what the run is trained with from now on, unless that is noted already."""
        here: dict[str, Any] = {"threads": torch.get_num_threads(), "jobs": jobs, "device": str(device)}
        if ranks.running():
            here["processes"] = ranks.world_size()
        if here not in self.ran_with:
            self.ran_with.append(here)

    def count_ways(self, experts: Sequence[int | None], active: Sequence[float | None]) -> list[str]:
        """Note how each layer multiplied in a step, and return it: `"sparse"`, `"active"` or `"dense"`.

        `experts`: per token, of each layer that was sparse. `active`: share of the neurons, of each layer that took
        only those.
        """
        ways = [
            "sparse" if k is not None else "dense" if share is None else "active"
            for k, share in zip(experts, active, strict=True)
        ]
        before = self.window_ways or [""] * len(ways)
        self.window_ways = [past + way[0] for past, way in zip(before, ways, strict=True)]
        return ways

    def new_window(self) -> None:
        """Begin anew what is counted from one train line to the next, but for the loss."""
        self.window_steps = self.window_sparse = 0
        self.window_seconds, self.window_ways = 0.0, []

    @property
    def train_seconds(self) -> float:
        """Wall-clock of training so far: all steps and measurements, without validation and saving."""
        return self.seconds_dense + self.seconds_sparse + self.seconds_measure
