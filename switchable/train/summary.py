"""The closing figures of a run (`summary.json`); docs/method.md explains every key."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

import switchable
from switchable import ranks
from switchable.compute.cpu.active.active import has_active
from switchable.train.counters import Counters
from switchable.train.flops import StepFlops
from switchable.train.parallel import split
from switchable.train.setup import Job, micro_rows
from switchable.train.timing import step_seconds


def summarise(
    counters: Counters, job: Job, flops: StepFlops, validation: dict[str, float | None]
) -> dict[str, Any]:
    """Return the run's closing figures; docs/method.md explains every key."""
    takes_part = job.controller.state.takes_part
    train = job.config.train
    seconds = step_seconds(
        job.model, split(job.batch(0), micro_rows(train))[0], train.gradient_accumulation_steps
    )
    # All-dense training has neither routers nor a monitor.
    all_dense = flops.dense * counters.steps
    head = flops.head * counters.steps
    return {
        **validation,
        "objective": job.objective,
        "loss_unit": job.batches.objective.unit,
        "steps": counters.steps,
        "tokens": counters.steps * flops.tokens,
        "parameters": parameters(job),
        "flops": counters.flops,
        "flops_nonembedding": counters.flops - head,
        "flops_all_dense": all_dense,
        "flops_ratio": counters.flops / all_dense,
        "flops_ratio_nonembedding": (counters.flops - head) / (all_dense - head),
        "sparse_fraction": counters.sparse_steps / counters.steps,
        "sparse_layers": [int(part) for part in takes_part],
        "experts_per_token": list(job.controller.state.experts_per_token),
        "active_layers": _active_layers(job),
        "switches": job.controller.switches,
        "regroupings": job.controller.regroupings,
        "step_speedup_sparse": seconds["dense"] / seconds["sparse"],
        "step_speedup_active": seconds["dense"] / seconds["active"],
        "router_overhead": seconds["dense_router"] / seconds["dense"] - 1.0,
        "wall_seconds": counters.train_seconds + counters.seconds_other,
        "wall_seconds_train": counters.train_seconds,
        "cpu_seconds_train": counters.cpu_seconds,
        "wall_seconds_dense": counters.seconds_dense,
        "wall_seconds_sparse": counters.seconds_sparse,
        "wall_seconds_measure": counters.seconds_measure,
        "processes": ranks.world_size(),
        "wall_ratio": counters.train_seconds / (seconds["dense"] * counters.steps),
        "ran_with": counters.ran_with,
        "versions": {
            "switchable": switchable.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "experts": dataclasses.asdict(job.config.switch),
    }


def _active_layers(job: Job) -> list[int]:
    """Return 1 for each layer whose dense steps multiply active neurons only."""
    with job.replica.autocast():
        return [
            int(
                layer.ssd.multiplies_active
                and has_active(layer.ssd.weights.up_FD, layer.ssd.weights, layer.ssd.settings.activation)
            )
            for layer in job.controller.layers
        ]


def parameters(job: Job) -> int:
    """Return how many parameters the model has, routers included."""
    return sum(p.numel() for p in job.model.parameters())
