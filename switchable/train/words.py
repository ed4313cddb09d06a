"""What a run says first and last: what it is made of, and what came of it. Everything in between is `log.py`'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from switchable import ranks
from switchable.choices import active_limit, auto_precision, timed_ffn
from switchable.compute.cpu.active.active import MOST_ACTIVE
from switchable.compute.measured import PARTS, SHARES, sparse_speedup
from switchable.config import RunConfig, read_stored, settled_for
from switchable.data.tokenizers import load_tokenizer
from switchable.ffn.active_training import LEAST_TOKENS
from switchable.recipes import RECIPES
from switchable.settings import SwitchConfig
from switchable.store.rundir import RunDir
from switchable.switching.controller import Measurement
from switchable.switching.schedule import Schedule
from switchable.train.counters import Counters
from switchable.train.flops import StepFlops
from switchable.train.setup import Job


def opening(job: Job, rundir: RunDir, flops: StepFlops, counters: Counters) -> list[str]:
    """Return what a run says of itself before its first step; what it has read, it has said while reading."""
    train, text = job.config.train, job.data.train
    processes = f", {ranks.world_size()} processes ({train.parallel})" if ranks.running() else ""
    resumed = f"goes on after step {counters.steps:,}; " if counters.steps else ""
    tokens, threads, fresh = train.steps * flops.tokens, torch.get_num_threads(), not counters.steps
    return [
        *([_recipe(job)] if type(job.controller.schedule) is Schedule else []),
        *([_precision(job.config), *_speed(job)] if fresh else []),
        f"model: {job.config.model.family}, {job.parameters:,} parameters, vocabulary of {job.data.vocab_size:,}; "
        f"{job.report.ffns}",
        f"training: {train.steps:,} steps of {flops.tokens:,} tokens, {tokens:,} in all ({tokens / text.tokens:.2g} "
        f"times the text); {train.precision} on {job.device}, {threads} CPU thread{'s' * (threads > 1)}{processes}",
        f"{resumed}writes to {rundir.path}: a checkpoint every {train.checkpoint_every:,} steps, figures in "
        f"{rundir.metrics.name} and {rundir.tensorboard.name}/",
    ]


def _precision(config: RunConfig) -> str:
    """Say why a run has its precision, given what `auto` stands for and why."""
    name, (auto, why) = config.train.precision, auto_precision(config.model, config.train)
    told = "is what precision auto is" if name == auto else f"was asked for; auto would be {auto}"
    return f"precision {name}: it {told} here ({why})"


def _limit(job: Job) -> list[str]:
    """Say below what share of active neurons dense steps leave out the others, where that is not what was asked."""
    switch, train = job.config.switch, job.config.train
    asked, clock = switch.active_below, active_limit(job.config.model, train, switch.recipe)
    if asked not in (0, RECIPES[switch.recipe]["active_below"]) and not job.controller.schedule.skips(0, 0.0):
        return [
            f"dense steps multiply every neuron: idle ones are left out on a CPU, of {LEAST_TOKENS} tokens or more at "
            "once, in float32 or where it multiplies bfloat16, by ReLU types without dropout between projections"
        ]
    found = min(asked, MOST_ACTIVE.get(getattr(torch, train.precision), 1.0))
    if found == RECIPES[switch.recipe]["active_below"] or (found == asked != clock):
        return []
    limit = f"where fewer than {found:g} are active" if found else "in no layer"
    slower = f"elsewhere that would be slower in {train.precision} here"
    return [f"dense steps leave out idle neurons {limit}: {slower}"]


def _speed(job: Job) -> list[str]:
    """Say what recipe auto weighs, or from where on idle neurons are left out, and how fast sparse steps begin."""
    config, schedule = job.config, job.controller.schedule
    costs = schedule.costs
    if not costs and config.switch.never_sparse:
        return _limit(job)
    if not costs:
        estimates = schedule.estimates_at(schedule.joins_from)
        return sparse_speed(config, config.switch.experts_per_token, estimates) + _limit(job)
    ways = (
        f"{costs[0].told(share, 1 / part)} with {share:.0%} of the neurons active or 1/{part} of the experts"
        for share, part in zip(SHARES, PARTS, strict=True)
    )
    return [f"an FFN on {costs[0].tokens} tokens takes here, forward and backward: {'; '.join(ways)}"]


def sparse_speed(config: RunConfig, experts_per_token: float, estimates: bool) -> list[str]:
    """Say how fast sparse steps are beside dense ones, with so many experts for each token, on average over layers.

    `estimates` says that experts are chosen by products in 8 bits.
    """
    ffn, switch = timed_ffn(config.model, config.train), config.switch
    if ffn is None:
        return []
    few = round(experts_per_token)
    speedup = sparse_speedup(ffn, switch.num_experts, few, config.train.precision, estimates)
    choice = "their choice by 8 bits" if estimates else "the router"
    found = f"{few} of {switch.num_experts} experts and {choice} are {speedup:.2f} times as fast as a dense FFN here"
    why = "sparse steps are slower than dense ones: recipe auto takes them only at the end, to teach sparse mode"
    return [f"{found}, forward and backward{'' if speedup >= 1 else f'; {why}'}"]


def sparse_begins(config: RunConfig, measured: Measurement, estimates: bool) -> str:
    """Say that sparse steps begin, and how fast they are with the experts that layers were found to need."""
    parts = [k for k, part in zip(measured.experts_per_token, measured.takes_part, strict=True) if part]
    speed = sparse_speed(config, sum(parts) / len(parts), estimates)
    return ": ".join([f"step {measured.step}: sparse steps begin in {len(parts)} layers", *speed])


def _recipe(job: Job) -> str:
    """Name the recipe, what of it was changed, and when steps are sparse."""
    config, switch, schedule = job.config, job.config.switch, job.controller.schedule
    plain = settled_for(SwitchConfig(recipe=switch.recipe), config.model, config.train)
    before, now = (dataclasses.asdict(each) for each in (plain, switch))
    changes = [f"{name}={now[name]}" for name in now if now[name] != before[name]]
    changed = f"; changed: {', '.join(changes)}" if changes else ""
    taught = f"from step {schedule.dense_until:,} on"
    when = f"{taught} at the earliest {switch.sparse_steps} sparse steps to each dense one"
    if schedule.weighs:
        when += f"; already from step {schedule.joins_from:,} on in layers where that is clearly cheaper here"
    if schedule.estimates_at(schedule.joins_from):
        when += ", experts chosen by products in 8 bits, in the last steps by the router"
    return f"recipe {switch.recipe}: {'no step is sparse' if switch.never_sparse else when}{changed}"


def closing(rundir: RunDir, figures: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what a finished run says (what was saved, its losses, its cost), and the command to give next."""
    saved = f"saved in {rundir.path}: final/ (the model, a plain Hugging Face folder), summary.json (all figures), "
    seconds, ratio = figures["wall_seconds_train"], figures["wall_ratio"]
    said = [
        f"{saved}{rundir.report.name} (what happened), checkpoints/ and snapshots/ (the way there)",
        f"loss on the validation text, {figures['loss_unit']}: {_losses(figures)}.",
        f"cost: {figures['flops_ratio_nonembedding']:.2f} of the FLOPs of all-dense training without the output head "
        f"({figures['flops_ratio']:.2f} with it), and {ratio:.2f} of its time: {seconds:,.1f} s, where as many plain "
        f"dense steps would have taken {seconds / ratio:,.1f} s.",
    ]
    return said, ["switchable", "generate", str(rundir.path), "--prompt", _prompt(rundir, figures)]


def _losses(figures: Mapping[str, Any]) -> str:
    dense, sparse = figures["val_loss_dense"], figures["val_loss_sparse"]
    if sparse is None:
        why = "no layer had become sparse and stable enough for one"
        if figures["experts"]["min_dense_fraction"] == 1:
            why = "the recipe never trains one"
        return f"{dense:.4f} in dense mode; there is no sparse mode, because {why}"
    each, taking_part = figures["experts_per_token"], figures["sparse_layers"]
    parts = [k for k, part in zip(each, taking_part, strict=True) if part]
    counts = " to ".join(map(str, sorted({min(parts), max(parts)})))
    layers = f"{len(parts)} of {len(taking_part)} layers"
    where = f"with {counts} of {figures['experts']['num_experts']} experts per token in {layers}"
    return f"{dense:.4f} in dense mode, {sparse:.4f} in sparse mode ({where})"


def _prompt(rundir: RunDir, figures: Mapping[str, Any]) -> str:
    """Return a prompt that the model can work with: the configuration's, or one with a blank where it needs one."""
    given = read_stored(rundir.config).train.sample_prompt
    if given is not None:
        return given
    blanks = {"causal": "Once upon a time", "span": "Once <extra_id_0> a time"}
    return blanks.get(figures["objective"]) or f"Once {load_tokenizer(rundir.tokenizer).mask_token} a time"
