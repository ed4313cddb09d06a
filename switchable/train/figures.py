"""The figures of a finished run: what each is called, its unit, and what it says.

`summary.json`, the table in docs/method.md, the comparison's table and the report take names and units from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NATS, BITS, FLOPS, SECONDS = "nats per predicted token", "bits per byte of text", "FLOPs", "seconds"


def figure(name: str, unit: str = "", more: str = "") -> Any:
    """Declare a field: what it is called in tables, its unit, and what else there is to know of it."""
    return dataclasses.field(metadata={"name": name, "unit": unit, "more": more})


@dataclass(frozen=True)
class Summary:
    """The figures of a run."""

    val_loss_dense: float | None = figure(
        "validation loss, dense mode", NATS, "null for a mixture of experts, which has no dense mode"
    )
    val_loss_sparse: float | None = figure(
        "validation loss, sparse mode", NATS, "on the same tokens; null if no layer takes part"
    )
    bits_per_byte_dense: float | None = figure(
        "bits per byte, dense mode",
        BITS,
        "the loss, independent of the tokenizer; null for masked and span models",
    )
    bits_per_byte_sparse: float | None = figure("bits per byte, sparse mode", BITS)
    objective: str = figure(
        "what is predicted", more="`causal`, `masked` or `span` ([objectives.md](objectives.md))"
    )
    loss_unit: str = figure("what the loss is a mean over")
    steps: int = figure("training", "optimizer steps")
    tokens: int = figure("training", "tokens")
    parameters: int = figure("size of the model", "parameters", "routers included")
    flops: float = figure("FLOPs in all", FLOPS, "routers and measuring included")
    flops_nonembedding: float = figure("FLOPs without the output head", FLOPS)
    flops_all_dense: float = figure("FLOPs of the same steps without SSD", FLOPS)
    flops_ratio: float = figure("FLOPs / those of the same steps without SSD")
    flops_ratio_nonembedding: float = figure("the same ratio without the output head")
    sparse_fraction: float = figure("share of sparse steps")
    sparse_layers: Sequence[int] = figure("1 for each layer that takes part in sparse mode at the end")
    why_dense: str | None = figure(
        "which layers do not, and the limits that keep them out", more="null if all take part"
    )
    experts_per_token: Sequence[int] = figure("K of each layer in sparse mode at the end", "experts")
    active_layers: Sequence[int] = figure(
        "1 for each layer whose dense steps multiply active neurons only at the end"
    )
    switches: int = figure("changes of mode")
    regroupings: int = figure("regroupings", "layers", "whose neurons moved, each time counted")
    step_speedup_sparse: float | None = figure(
        "time of a plain dense step / of a sparse step",
        more="without routers / with them; the run's own step (precision, micro-batches, compiled blocks), "
        "in turns on one batch after training; null if no layer takes part",
    )
    step_speedup_active: float = figure(
        "time of a plain dense step / of a dense step as the run makes it at the end",
        more="routers learn, and the layers in `active_layers` multiply active neurons only",
    )
    router_overhead: float = figure(
        "extra time of a dense step in which routers learn", "fraction", "every neuron is multiplied in both"
    )
    wall_seconds: float = figure("wall-clock in all", SECONDS)
    wall_seconds_train: float = figure(
        "wall-clock of training",
        SECONDS,
        "all steps and measurements; also at every validation in `metrics.jsonl`",
    )
    cpu_seconds_train: float = figure("CPU time of training", SECONDS, "the same, of all threads together")
    wall_seconds_dense: float = figure("wall-clock of dense steps", SECONDS)
    wall_seconds_sparse: float = figure("wall-clock of sparse steps", SECONDS)
    wall_seconds_measure: float = figure("wall-clock of measuring and regrouping", SECONDS)
    processes: int = figure("training", "processes")
    wall_ratio: float = figure(
        "wall-clock of training / that of as many plain dense steps",
        more="these from the steps' own clock and the speed-ups above, in between by FLOPs",
    )
    ran_with: Sequence[dict[str, Any]] = figure(
        "threads, runs at a time, device", more="more than one entry if that changed on the way"
    )
    versions: Mapping[str, str] = figure("versions of what computed")
    experts: Mapping[str, Any] = figure("the settings of switching")


FIGURES = {f.name: f.metadata for f in dataclasses.fields(Summary)}
"""By the key in `summary.json`: `name`, `unit` and `more` of each figure."""


def label(key: str) -> str:
    """Return what a figure is called in a table, with its unit."""
    name, unit = FIGURES[key]["name"], FIGURES[key]["unit"]
    return f"{name} ({unit})" if unit else str(name)
