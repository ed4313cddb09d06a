"""Summing up a finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from switchable import ranks
from switchable.ffn.convert import why_dense
from switchable.train.counters import Counters
from switchable.train.figures import Summary
from switchable.train.flops import StepFlops
from switchable.train.loop import active_shares
from switchable.train.setup import Job
from switchable.train.timing import step_seconds
from switchable.versions import versions


def summarise(counters: Counters, job: Job, flops: StepFlops, validation: dict[str, float | None]) -> Summary:
    """Return the closing figures of a run; the speed of both modes is measured for it."""
    state = job.controller.state
    seconds = step_seconds(job)
    experts = [k if part else None for k, part in zip(state.experts_per_token, state.takes_part, strict=True)]
    dense = [None] * len(experts)
    timed = {"active": flops.step(dense, active_shares(job)), "sparse": flops.step(experts)}
    # All-dense training has neither routers nor a monitor.
    all_dense, head = flops.dense * counters.steps, flops.head * counters.steps
    return Summary(
        **validation,
        objective=job.objective,
        loss_unit=job.batches.objective.unit,
        steps=counters.steps,
        tokens=counters.steps * flops.tokens,
        parameters=job.parameters,
        flops=counters.flops,
        flops_nonembedding=counters.flops - head,
        flops_all_dense=all_dense,
        flops_ratio=counters.flops / all_dense,
        flops_ratio_nonembedding=(counters.flops - head) / (all_dense - head),
        sparse_fraction=counters.sparse_steps / counters.steps,
        sparse_layers=[int(part) for part in state.takes_part],
        why_dense=why_dense(job.model),
        experts_per_token=list(state.experts_per_token),
        active_layers=[int(active) for active in job.controller.state.multiplies_active],
        switches=job.controller.switches,
        regroupings=job.controller.regroupings,
        step_speedup_sparse=seconds["dense"] / seconds["sparse"] if "sparse" in seconds else None,
        step_speedup_active=seconds["dense"] / seconds["active"],
        router_overhead=seconds["dense_router"] / seconds["dense"] - 1.0,
        wall_seconds=counters.train_seconds + counters.seconds_other,
        wall_seconds_train=counters.train_seconds,
        cpu_seconds_train=counters.cpu_seconds,
        wall_seconds_dense=counters.seconds_dense,
        wall_seconds_sparse=counters.seconds_sparse,
        wall_seconds_measure=counters.seconds_measure,
        processes=ranks.world_size(),
        wall_ratio=counters.train_seconds / plain_seconds(counters, seconds, flops.step(dense), timed),
        ran_with=counters.ran_with,
        versions=versions(),
        experts=dataclasses.asdict(job.config.switch),
    )


def plain_seconds(
    counters: Counters, seconds: Mapping[str, float], full: float, timed: Mapping[str, float]
) -> float:
    """Return how long plain dense steps would have taken in place of a run's, at the speed the machine had then.

    A step's time, over that of a plain one, is taken to follow its FLOPs in a straight line: from a dense step in which
    routers learn and every neuron is multiplied to the step of its mode that was timed after training.

    `seconds` are those of one step of each kind (`step_seconds`), `full` the FLOPs of a dense step that multiplies
    every neuron, `timed` the FLOPs of the kinds `active` and `sparse` as they were timed.
    """
    total, dense_steps = 0.0, counters.steps - counters.sparse_steps
    for kind, steps, flops, clock in (
        ("active", dense_steps, counters.flops_dense, counters.seconds_dense),
        ("sparse", counters.sparse_steps, counters.flops_sparse, counters.seconds_sparse),
    ):
        most = full - timed[kind]
        saved = min(1.0, max(0.0, (full - flops / max(1, steps)) / most)) if most > 0 else 1.0
        # Where no layer takes part there is no sparse step to be timed, and none was made.
        took = (1 - saved) * seconds["dense_router"] + saved * seconds.get(kind, seconds["dense_router"])
        total += clock * seconds["dense"] / took
    return total
