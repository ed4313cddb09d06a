"""What a run says first and last: what it is made of, and what came of it. Everything in between is `log.py`'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from switchable import ranks
from switchable.config import RunConfig, auto_recipe, read_stored
from switchable.data.tokenizers import load_tokenizer
from switchable.recipes import WHY_AUTO
from switchable.sections import d_ff
from switchable.settings import SwitchConfig, settled
from switchable.store.rundir import RunDir
from switchable.switching.schedule import Schedule
from switchable.train.counters import Counters
from switchable.train.flops import StepFlops
from switchable.train.setup import Job


def opening(job: Job, rundir: RunDir, flops: StepFlops, counters: Counters) -> list[str]:
    """Return what a run says before its first step: recipe, text, model, steps, and where it writes."""
    train, text = job.config.train, job.data.train
    processes = f", {ranks.world_size()} processes ({train.parallel})" if ranks.running() else ""
    resumed = f"goes on after step {counters.steps:,}; " if counters.steps else ""
    tokens, threads = train.steps * flops.tokens, torch.get_num_threads()
    return [
        *([_recipe(job.config)] if type(job.controller.schedule) is Schedule else []),
        f"text: {', '.join(job.config.data.data) or 'source files of the Python installation'}: {text.tokens:,} tokens "
        f"to train on, {job.data.val.tokens:,} to validate on; vocabulary of {job.data.vocab_size:,}",
        f"model: {job.config.model.family}, {job.parameters:,} parameters; {job.report}",
        f"training: {train.steps:,} steps of {flops.tokens:,} tokens, {tokens:,} in all ({tokens / text.tokens:.2g} "
        f"times the text); {train.precision} on {job.device}, {threads} CPU thread{'s' * (threads > 1)}{processes}",
        f"{resumed}writes to {rundir.path}: a checkpoint every {train.checkpoint_every:,} steps, figures in "
        f"{rundir.metrics.name} and {rundir.tensorboard.name}/",
    ]


def _recipe(config: RunConfig) -> str:
    """Name the recipe, why it is this one, what of it was changed, and when steps are sparse."""
    switch, auto = config.switch, auto_recipe(config.model, config.train)
    why = f"it is what auto is here ({WHY_AUTO[auto]})"
    if switch.recipe != auto:
        why = f"it was asked for; auto would be {auto} here ({WHY_AUTO[auto]})"
    plain = settled(SwitchConfig(recipe=switch.recipe), d_ff(config.model), config.model.activation)
    before, now = (dataclasses.asdict(each) for each in (plain, switch))
    changes = [f"{name}={now[name]}" for name in now if now[name] != before[name]]
    changed = f"; changed: {', '.join(changes)}" if changes else ""
    first = round(switch.min_dense_fraction * config.train.steps)
    when = "no step is sparse"
    if not switch.never_sparse:
        when = f"from step {first:,} on at the earliest {switch.sparse_steps} sparse steps to each dense one"
    return f"recipe {switch.recipe}: {when}{changed}; {why}"


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
        never = figures["experts"]["min_dense_fraction"] == 1
        why = (
            "the recipe never trains one" if never else "no layer had become sparse and stable enough for one"
        )
        return f"{dense:.4f} in dense mode; there is no sparse mode, because {why}"
    parts = [
        k for k, part in zip(figures["experts_per_token"], figures["sparse_layers"], strict=True) if part
    ]
    counts = " to ".join(map(str, sorted({min(parts), max(parts)})))
    layers = f"{len(parts)} of {len(figures['sparse_layers'])} layers"
    where = f"with {counts} of {figures['experts']['num_experts']} experts per token in {layers}"
    return f"{dense:.4f} in dense mode, {sparse:.4f} in sparse mode ({where})"


def _prompt(rundir: RunDir, figures: Mapping[str, Any]) -> str:
    """Return a prompt that the model can work with: the configuration's, or one with a blank where it needs one."""
    given = read_stored(rundir.config).train.sample_prompt
    if given is not None:
        return given
    blanks = {"causal": "Once upon a time", "span": "Once <extra_id_0> a time"}
    return blanks.get(figures["objective"]) or f"Once {load_tokenizer(rundir.tokenizer).mask_token} a time"
