"""The settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.data.glue import TASKS
from switchable.options import Precision, option


@dataclass(frozen=True)
class FinetuneConfig(Precision):
    """What is learned, and how."""

    task: str = option("sst2", "task of GLUE to learn", choices=tuple(TASKS))
    mode: str = option("dense", "how the FFNs multiply", choices=("dense", "sparse"))
    experts_per_token: int | None = option(
        None, "experts per token in sparse mode; none: the model's own", least=1, metavar="K"
    )
    epochs: float = option(3.0, "passes over the training examples", above=0, most=10_000, metavar="N")
    batch_size: int = option(32, "examples per optimizer step", least=1)
    learning_rate: float = option(
        5e-5,
        "peak learning rate; it rises over the first 6 % of the steps and falls linearly to 0",
        above=0,
        most=1000,
        metavar="LR",
    )
    max_length: int = option(128, "longest input in tokens; longer ones are cut", least=1, metavar="TOKENS")
    max_train_examples: int | None = option(None, "the first so many training examples; none: all", least=1)
    seed: int = option(0, "random seed of head and order", least=0, most=2**32 - 1)
    device: str | None = option(None, "torch device; none: cuda if there is one, else cpu")
    threads: int | None = option(None, "CPU threads; none: torch's choice", least=1, most=1024)
