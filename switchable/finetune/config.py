"""The settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.data.glue import TASKS
from switchable.errors import InputError, nearest


@dataclass(frozen=True)
class FinetuneConfig:
    """What is learned, and how."""

    task: str
    """`"sst2"`, `"cola"` or `"rte"`."""
    mode: str = "dense"
    """How the FFNs multiply in training: `"dense"` or `"sparse"`."""
    experts_per_token: int | None = None
    """K in sparse mode; None: the model's own."""
    epochs: float = 3.0
    """Passes over the training examples."""
    batch_size: int = 32
    """Examples per optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate; it rises over the first 6 % of the steps and falls linearly to 0."""
    max_length: int = 128
    """Longest input in tokens; longer ones are cut."""
    max_train_examples: int | None = None
    """Use the first so many training examples only."""
    seed: int = 0
    """Random seed of the head's weights and of the order."""
    device: str | None = None
    threads: int | None = None
    """CPU threads."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(
                f"task {self.task!r} is not known; use one of {', '.join(TASKS)}{nearest(self.task, TASKS)}"
            )
        for name in ("batch_size", "max_length", "max_train_examples", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} is out of range; use a whole number of at least 1")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} is out of range; use a positive number")
