"""`dense-then-moe`: a finished dense model is cut into experts, and routers learn to choose among them.

    load the dense run's weights -> group each layer's neurons -> a router per layer learns on training text

The weights stay as they are (the neurons change places, which changes nothing), so dense mode's loss is the dense
run's. The routers see as much text as `ROUTER_FRACTION` of the run, from its beginning; which layers become sparse is
decided by their activation ratio, as in `ssd`. All of it is charged to the run's clock and FLOPs.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from switchable.compare.baselines import StaticSchedule
from switchable.compare.runs import Run
from switchable.config import to_dict
from switchable.errors import InputError
from switchable.ffn.convert import is_router_parameter, kept_modes, layers_of, set_mode
from switchable.files import read_json, write_text
from switchable.progress import progress_bar
from switchable.store import folders
from switchable.store.restore import restore_model
from switchable.store.rundir import RunDir
from switchable.switching.monitor import measure
from switchable.switching.switch import current_structure, group_anew
from switchable.train.counters import Counters
from switchable.train.flops import StepFlops, router_learning
from switchable.train.log import RunLog
from switchable.train.loop import Trainer
from switchable.train.pretrain import count_step, finish
from switchable.train.setup import Job, set_up
from switchable.train.signals import StopRequest

ROUTER_FRACTION = 0.05  # router training as a fraction of the run's optimizer steps


def make_from_dense(run: Run, cache: Path, jobs: int) -> None:
    """Make the run, in place of what its folder holds, from the finished dense run of its seed.

    `jobs` runs share the machine at this time, which is noted. Raises FolderInUse if another process is at it, and
    InputError if the folder holds something else than a run, the dense run is damaged or its text has changed.
    """
    assert run.starts_from is not None
    rundir = RunDir(run.path)
    rundir.acquire()
    try:
        rundir.sweep()
        rundir.refuse_to_replace(True, run.config.data.sources)
        job = set_up(run.config, cache)
        dense = RunDir(run.starts_from)
        _load_weights(dense.final, job.model)
        rundir.begin(yaml.safe_dump(to_dict(run.config), sort_keys=False))
        write_text(rundir.metrics, dense.metrics.read_text(encoding="utf-8"))
        _cut(job, rundir, read_json(dense.summary), jobs)
    finally:
        rundir.release()


def _cut(job: Job, rundir: RunDir, before: dict[str, Any], jobs: int) -> None:
    kept = {name: before[name] for name in ("steps", "flops", "ran_with")}
    counters = Counters(job.data.train.sha256, **kept)
    counters.seconds_dense, counters.cpu_seconds = before["wall_seconds_dense"], before["cpu_seconds_train"]
    counters.flops_dense = counters.flops
    counters.note_machine(jobs, job.device)
    with closing(RunLog(rundir, counters.steps, counters.steps)) as log:
        flops = count_step(job)
        trainer = Trainer(job, rundir, log, flops, counters, StopRequest())
        begin, cpu = time.perf_counter(), time.process_time()
        counters.flops += cut_into_experts(job, flops)
        counters.seconds_measure += time.perf_counter() - begin
        counters.cpu_seconds += time.process_time() - cpu
        trainer.evaluate()
        assert trainer.validation is not None
        now, then = trainer.validation["val_loss_dense"] or 0.0, before["val_loss_dense"]
        if abs(now - then) > 1e-3:
            raise InputError(
                f"the model of {rundir.path} has another loss ({now:.4f}) than the dense run it comes from "
                f"({then:.4f}); has its text changed? Compare into another folder"
            )
        finish(trainer)


def cut_into_experts(job: Job, flops: StepFlops) -> float:
    """Group the neurons of a dense model, train routers, and let the sparse layers take part in sparse mode.

    The job's model holds the trained dense weights. Returns the FLOPs it took.
    """
    switch, controller, layers = job.config.switch, job.controller, layers_of(job.model)
    seed, total = job.config.train.seed, job.config.train.steps
    precision = job.replica.autocast
    _, found = measure(job.model, controller.probe, [None] * len(layers), seed, precision=precision)
    group_anew(layers, [layer.labels_F for layer in found])
    steps = max(1, round(ROUTER_FRACTION * total))
    train_routers(job, steps)
    spent = 2 * flops.measurement(controller.probe_tokens) + steps * router_step_flops(job.model, flops)
    # Which layers take part, and with how many experts, is decided as in training, but for their stability.
    structures = map(current_structure, layers)
    last = [dataclasses.replace(a, labels_F=labels_F) for a, labels_F in zip(found, structures, strict=True)]
    measures, _ = measure(job.model, controller.probe, last, seed, precision=precision)
    rule = dataclasses.replace(
        switch, recipe="early", min_dense_fraction=0.0, monitor_every=1, stability_threshold=0.0
    )
    controller.state = state = StaticSchedule(rule, total).decide(total - 1, controller.state, measures).state
    parts = zip(layers, state.takes_part, state.why_dense, state.experts_per_token, strict=True)
    for layer, part, why, k in parts:
        layer.ssd.takes_part, layer.ssd.why_dense = part, why
        layer.ssd.set_experts_per_token(k)
    return spent


def train_routers(job: Job, steps: int) -> None:
    """Train the routers in dense mode on the run's first `steps` batches; nothing else learns.

    The learning rate falls linearly from the configuration's `router_learning_rate`.
    """
    model, peak = job.model, job.config.train.router_learning_rate
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_router_parameter(name))
    routers = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(routers, lr=peak, weight_decay=0.0)
    try:
        with kept_modes(model) as layers:
            set_mode(model, "dense")
            model.train()
            for layer in layers:
                layer.ssd.router_learns = True
            for step in progress_bar("training routers", "step", over=range(steps)):
                optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
                # Every router's loss is attached to its layer's output: this trains them all.
                job.replica.forward_backward(job.batch(step))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        model.requires_grad_(True)


def router_step_flops(model: nn.Module, flops: StepFlops) -> float:
    """Return the FLOPs of one step of `train_routers`: forward, gradients of the inputs, and the routers."""
    with kept_modes(model) as layers:
        for layer in layers:
            layer.ssd.router_learns = True
        return flops.dense * 2 / 3 + sum(router_learning(layer) for layer in layers) * flops.tokens


def _load_weights(final: Path, model: nn.Module) -> None:
    """Load a dense run's exported weights, but no routers; InputError if they are damaged, or another model's."""
    if (damage := folders.verify(final)) is not None:
        summary = final.parent / "summary.json"
        raise InputError(f"{final} is damaged ({damage}); remove {summary} and start again")
    restore_model(final, model, routers=False)
