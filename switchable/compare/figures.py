"""What a comparison says in numbers: pure functions of the runs' summaries and validations.

A run's curve is its validations: tokens, FLOPs and seconds of training so far, and the loss in its *best mode*, the
lower of the two. Between validations it is a straight line. Against the dense run of the same seed, whose final
loss is L after T seconds:

    time to dense's loss     first t at which the curve is at or below L, divided by T; none if it never is
    loss at dense's time     the curve at T; its last value if the run ended earlier

and the same with FLOPs for seconds, and the first of the two with CPU time, which other work on the machine disturbs
less. Everything is computed per seed, then averaged: the seeds' common ups and downs cancel. The spread is the standard
deviation over seeds (n - 1 below the fraction line), none for a single seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = dict[str, float | None]

OWN = (
    "val_loss_dense", "val_loss_sparse", "bits_per_byte_dense", "bits_per_byte_sparse", "flops", "flops_nonembedding",
    "sparse_fraction", "expert_fraction", "wall_seconds", "cpu_seconds",
)  # fmt: skip
"""Figures of a run by itself."""


@dataclass(frozen=True)
class Validation:
    """One validation of a run, and what training had cost by then (seconds and FLOPs of training alone)."""

    tokens: float
    flops: float
    seconds: float
    cpu_seconds: float  # of all threads together
    loss: float  # nats per token in the best mode


def curve(records: Sequence[Mapping[str, Any]]) -> list[Validation]:
    """Return the validations among the records of a `metrics.jsonl`."""
    found = []
    for r in (record for record in records if record["kind"] == "eval"):
        best = min(loss for loss in (r["val_loss_dense"], r["val_loss_sparse"]) if loss is not None)
        found.append(Validation(r["tokens"], r["flops"], r["train_seconds"], r["cpu_seconds"], best))
    return found


def cost_to_reach(curve: Sequence[Validation], target: float, axis: str) -> float | None:
    """Return the first cost at which the curve is at or below a loss (nats per token), None if it never is.

    The cost is `seconds`, `cpu_seconds`, `flops` or `tokens`: `axis` says which.
    """
    before: Validation | None = None
    for point in curve:
        if point.loss <= target:
            end = float(getattr(point, axis))
            if before is None:
                return end
            start, share = float(getattr(before, axis)), (before.loss - target) / (before.loss - point.loss)
            return start + share * (end - start)
        before = point
    return None


def loss_at(curve: Sequence[Validation], cost: float, axis: str) -> float | None:
    """Return the loss of the curve at a cost: its last one if the run ended earlier, None before its first."""
    before: Validation | None = None
    for point in curve:
        end = float(getattr(point, axis))
        if end >= cost:
            if before is None:
                return point.loss if end == cost else None
            start = float(getattr(before, axis))
            return before.loss + (cost - start) / (end - start) * (point.loss - before.loss)
        before = point
    return None if before is None else before.loss


def own_figures(summary: Mapping[str, Any]) -> Figures:
    """Return the figures of one run by itself, from its summary."""
    experts = summary["experts"]["num_experts"]
    computed = [
        k / experts if part else 1.0
        for part, k in zip(summary["sparse_layers"], summary["experts_per_token"], strict=True)
    ]
    renamed = {
        "wall_seconds": summary["wall_seconds_train"],
        "cpu_seconds": summary["cpu_seconds_train"],
        "expert_fraction": statistics.fmean(computed),
    }
    return {name: renamed[name] if name in renamed else summary[name] for name in OWN}


def paired_figures(
    own: Figures, own_curve: Sequence[Validation], dense: Figures, dense_curve: Sequence[Validation]
) -> Figures:
    """Return the figures of one run against the dense run of its seed; the ratios are below 1 if it is cheaper."""
    goal = dense["val_loss_dense"]
    assert goal is not None
    last = dense_curve[-1]

    def to_reach(axis: str) -> float | None:
        return _over(cost_to_reach(own_curve, goal, axis), getattr(last, axis))

    return {
        "delta_dense": _minus(own["val_loss_dense"], goal),
        "delta_sparse": _minus(own["val_loss_sparse"], goal),
        "flops_ratio": _over(own["flops"], dense["flops"]),
        "flops_ratio_nonembedding": _over(own["flops_nonembedding"], dense["flops_nonembedding"]),
        "wall_ratio": _over(own["wall_seconds"], dense["wall_seconds"]),
        "cpu_ratio": _over(own["cpu_seconds"], dense["cpu_seconds"]),
        "time_to_dense_loss_ratio": to_reach("seconds"),
        "cpu_to_dense_loss_ratio": to_reach("cpu_seconds"),
        "loss_at_dense_time": loss_at(own_curve, last.seconds, "seconds"),
        "flops_to_dense_loss_ratio": to_reach("flops"),
        "loss_at_dense_flops": loss_at(own_curve, last.flops, "flops"),
    }


def gain_at_equal_flops(ours: Sequence[Validation], theirs: Sequence[Validation]) -> float | None:
    """Return by how many nats our curve is below theirs at the most FLOPs that both have spent."""
    flops = min(ours[-1].flops, theirs[-1].flops)
    return _minus(loss_at(theirs, flops, "flops"), loss_at(ours, flops, "flops"))


def over_seeds(per_seed: Mapping[int, float | None]) -> dict[str, Any]:
    """Return mean and spread over the seeds; both None if a seed has no value."""
    values = list(per_seed.values())
    known = [value for value in values if value is not None]
    whole = bool(values) and len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if whole else None,
        "spread": statistics.stdev(known) if whole and len(known) > 1 else None,
        "per_seed": {str(seed): value for seed, value in per_seed.items()},
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b
