"""How long the steps of a run take: its own optimizer step, timed in turns by its kinds, after one that does not count.

    step_speedup_sparse = median time of a plain dense step / median time of a sparse step

    step_speedup_active = median time of a plain dense step / median time of a dense step as the run makes it now

A *plain* dense step is one of the model without any router that multiplies every neuron, what all-dense training would
pay. What is timed is what the loop calls (`loop.update`): the run's batches, precision, micro-batches, compiled blocks
and exchange between ranks. The weights stay as they are (learning rate 0).
"""

from __future__ import annotations

import torch

from switchable.ffn.convert import kept_modes, set_mode
from switchable.timing import take_turns
from switchable.train.loop import update
from switchable.train.setup import Job

KINDS = {
    "dense": ("dense", False, False),
    "dense_router": ("dense", True, False),
    "active": ("dense", True, True),
    "sparse": ("sparse", True, False),
}
"""Kinds of steps: the mode, whether routers learn, and whether layers multiply active neurons only, if they do now."""


def step_seconds(job: Job, rounds: int = 9) -> dict[str, float]:
    """Return the median seconds of one step of each kind, over so many rounds.

    Without a layer that takes part there is no `sparse`. Weights, modes and gradients are as before afterwards; the
    optimizer's moments are not.
    """

    def step(mode: str, routers: bool, active: bool) -> None:
        set_mode(job.model, mode)
        for layer, (learns, multiplies_active) in zip(layers, given, strict=True):
            layer.ssd.router_learns = learns and routers
            layer.ssd.multiplies_active = multiplies_active and active
        update(job, 0)

    groups = job.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    with kept_modes(job.model) as layers:
        given = [(layer.ssd.router_learns, layer.ssd.multiplies_active) for layer in layers]
        job.model.train()
        for group in groups:
            group["lr"] = 0.0
        contenders = {kind: lambda how=how: step(*how) for kind, how in KINDS.items()}
        if not any(layer.ssd.takes_part for layer in layers):
            del contenders["sparse"]
        medians = take_turns(contenders, 0.0, turns=rounds, wait=lambda: _wait(job)).medians
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return medians


def warm_up(job: Job) -> None:
    """Go forward and backward once in every way that the run may, so that no compiling falls into its clock.

    A run that was resumed would have paid for that several times. Nothing that is computed later changes.
    """
    switch = job.config.switch
    ways = [
        ("dense", False, False),
        ("dense", True, False),
        ("sparse", False, False),
        ("sparse", False, True),
    ]
    with kept_modes(job.model) as layers, torch.random.fork_rng():
        job.model.train()
        for mode, active, estimates in ways:
            if (active and not switch.active_below) or (mode == "sparse" and switch.never_sparse):
                continue
            for layer in layers:
                layer.ssd.mode, layer.ssd.multiplies_active, layer.ssd.estimates = mode, active, estimates
            job.replica.forward_backward(job.batch(0))
            job.optimizer.zero_grad(set_to_none=True)
        for layer in layers:
            layer.ssd.active_count.take(layer.ssd.d_ff)
    _wait(job)


def _wait(job: Job) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
