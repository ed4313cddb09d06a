"""The settings of `switchable eval`."""

from __future__ import annotations

from dataclasses import dataclass

from switchable.options import Precision, option, refuse_without_sparse


@dataclass(frozen=True)
class EvalConfig(Precision):
    """On which tasks a model is evaluated, and how; `DataConfig` says on what text."""

    tasks: tuple[str, ...] = option(
        (),
        "lambada=PATH, sst2=PATH, cola=PATH, rte=PATH with local data, or names of lm-eval's tasks",
        metavar="TASK",
    )
    mode: tuple[str, ...] = option(
        (), "how the FFNs multiply; none: both, if the model can", choices=("dense", "sparse")
    )
    experts_per_token: tuple[int, ...] = option((), "values of K in sparse mode", least=1, metavar="K")
    mass: tuple[float, ...] = option(
        (),
        "besides: sparse mode with up to K experts, the fewest whose shares add up to this (with --speed: 0.9)",
        above=0,
        below=1,
        usual="0.9",
        metavar="SHARE",
    )
    speed: bool = option(
        False, "how fast the model writes in each way, and a picture of loss against speed (speed.png)"
    )
    weights: str | None = option(
        None,
        "round the weights to this width first; none: as they are",
        choices=("float32", "bfloat16", "int8"),
    )
    batch_size: int = option(8, "sequences at a time", least=1)
    sequence_length: int | None = option(
        None, "window of text, at most the model's positions; none: the training's", least=2, metavar="TOKENS"
    )
    limit: int | None = option(None, "examples per task at most", least=1)
    device: str | None = option(None, "torch device; none: cuda if there is one, else cpu")
    threads: int | None = option(None, "CPU threads; none: torch's choice", least=1, most=1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode:
            refuse_without_sparse(self.mode, experts_per_token=self.experts_per_token, mass=self.mass)
