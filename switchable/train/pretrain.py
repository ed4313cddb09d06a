"""One pre-training run from a configuration to its summary: start or resume, train, export, measure.

new run:   lock the folder -> set up -> count FLOPs -> train
resume:    lock the folder -> same configuration? -> newest checkpoint whole? -> set up -> restore -> train

Under torchrun every rank goes through all of it. Rank 0 alone holds the lock, writes and speaks. The report of a
finished run is drawn by whoever started it (`study.report.write_run_report`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.fsdp import FSDPModule

from switchable import ranks
from switchable.config import RunConfig, changed, check_trainable, from_dict, read_stored, to_dict
from switchable.data.tokenizers import load_tokenizer, save_tokenizer
from switchable.data.tokens import find_prepared
from switchable.errors import InputError
from switchable.ffn.convert import kept_modes
from switchable.files import full_disk_told, read_json, write_json
from switchable.infer.generate import write
from switchable.infer.sampling import Sampling
from switchable.recipes import AUTO
from switchable.store import checkpoint, folders, restore
from switchable.store.probe import save_probe
from switchable.store.rundir import RunDir
from switchable.train.counters import Counters
from switchable.train.flops import StepFlops, count
from switchable.train.log import open_log
from switchable.train.loop import Trainer
from switchable.train.parallel import split
from switchable.train.setup import SSD, Job, Variant, micro_rows, set_up
from switchable.train.signals import StopRequest, TrainingStopped
from switchable.train.summary import summarise
from switchable.train.timing import warm_up
from switchable.train.words import opening

MAY_CHANGE = (
    "log_every", "eval_every", "checkpoint_every", "keep", "gradient_accumulation_steps", "parallel",
    "activation_checkpointing", "compile", "threads", "device", "sample_prompt",
)  # fmt: skip
"""Settings of `train` that a resumed run may have different: they alter nothing that is computed but its rounding."""
CHOSEN_ONCE = (("recipe", AUTO), ("precision", AUTO))
"""Settings that a resumed run has as its start chose them."""
MAY_MOVE = ("data", "tokenizer")
"""Settings of `data` that say where something lies: they may differ where the tokens are the same."""


def pretrain(
    config: RunConfig, out: Path, cache: Path, overwrite: bool = False, quiet: bool = False, jobs: int = 1,
    variant: Variant = SSD,
) -> dict[str, Any]:  # fmt: skip
    """Start a run in the folder `out`, train to its end, and return its summary, as written to `summary.json`.

    Args:
        cache: folder for token files.
        overwrite: replace a run that is there.
        jobs: runs that share the machine at this time; only noted in the summary.
        variant: what a baseline exchanges.

    Raises:
        InputError: bad settings or data, folder in use or not empty, loss not finite, disk full.
        TrainingStopped: stopped by a signal, after saving.
    """
    check_trainable(config)
    with _locked(RunDir(out)) as rundir:
        ranks.on_main(lambda: rundir.refuse_to_replace(overwrite, config.data.sources))
        # Ranks may be of different speed: what was left to the machine, rank 0's chooses for all.
        config = from_dict(ranks.from_main(to_dict(config)))
        job = set_up(config, cache, quiet or not ranks.is_main(), variant)
        ranks.on_main(lambda: _begin(rundir, job))
        return _run(job, rundir, Counters(data=job.data.train.sha256), quiet, jobs)


def resume(
    out: Path, flags: dict[str, Any], cache: Path, resume_from: str | None = None, quiet: bool = False, jobs: int = 1,
    variant: Variant = SSD,
) -> dict[str, Any]:  # fmt: skip
    """Go on with the run in the folder `out`, bitwise as if it had never stopped; the rest is as for `pretrain`.

    Args:
        flags: settings given again, by field name; those that alter what is computed must be as they were.
        resume_from: name of a checkpoint, e.g. `step-000300`; default: the newest.

    Raises:
        InputError: nothing to resume, a setting or the data has changed, or the checkpoint is damaged.
        TrainingStopped: stopped by a signal, after saving.
    """
    if not ranks.on_main((out / "config.yaml").exists):
        raise InputError(f"{out} holds no run to resume (no config.yaml); start one without --resume")
    with _locked(RunDir(out)) as rundir:
        config = ranks.together(lambda: _same_config(rundir, flags))
        step = ranks.on_main(lambda: _choose_checkpoint(rundir, resume_from))
        tokens = read_json(rundir.checkpoint(step) / "training.json")["counters"]["data"]
        moved = config.data != read_stored(rundir.config).data
        job = set_up(config, cache, quiet or not ranks.is_main(), variant, None if moved else tokens)
        ranks.together(lambda: _check_same_data(rundir, job, cache, tokens))
        ranks.on_main(rundir.claim)
        folder = rundir.checkpoint(step)
        controller_state, counters = restore.restore_training(folder, job.model, job.optimizer)
        ranks.on_main(lambda: rundir.go_back(step))
        job.controller.load_state_dict(controller_state)
        return _run(job, rundir, Counters(**counters), quiet, jobs)


@contextmanager
def _locked(rundir: RunDir) -> Iterator[RunDir]:
    """Lock a run's folder and remove what a killed process left; the lock is given back at the end of the block.

    InputError: the folder is in use, or the disk is full.
    """

    def lock() -> None:
        rundir.acquire()
        rundir.sweep()

    remedy = "what was saved stands. Free some space and go on (pretrain: with --resume)"
    try:
        ranks.on_main(lock)
        with full_disk_told(f"writing in {rundir.path}", remedy):
            yield rundir
    finally:
        if ranks.is_main():
            rundir.release()


def _begin(rundir: RunDir, job: Job) -> None:
    rundir.begin(yaml.safe_dump(to_dict(job.config), sort_keys=False))
    rundir.claim()
    save_tokenizer(job.tokenizer, rundir.tokenizer)
    save_probe(rundir.probe, job.controller.probe)


def _same_config(rundir: RunDir, flags: dict[str, Any]) -> RunConfig:
    before = read_stored(rundir.config)
    merged = to_dict(before)
    # What was left to the machine was chosen when the run was started.
    given = {key: value for key, value in flags.items() if (key, value) not in CHOSEN_ONCE}
    for values in merged.values():
        values.update({key: given[key] for key in values.keys() & given.keys()})
    after = from_dict(merged, "the flags")
    may = MAY_CHANGE + MAY_MOVE
    forbidden = [line for line in changed(before, after) if line.split(":")[0].split(".")[1] not in may]
    if forbidden:
        raise InputError(
            f"a run cannot be resumed with other settings ({'; '.join(forbidden)}); "
            f"leave them out, or start a new run in another folder. May change: {', '.join(may)}"
        )
    return after


def _choose_checkpoint(rundir: RunDir, name: str | None) -> int:
    """Return the step to resume from, its checkpoint verified.

    InputError: there is none, the name is unknown, or it is damaged (the newest good one is named).
    """
    if not (steps := rundir.steps()):
        raise InputError(f"{rundir.path} holds no checkpoint; start the run again with --overwrite")
    names = {rundir.checkpoint(step).name: step for step in steps}
    if name is not None and name not in names:
        raise InputError(f"{rundir.path} has no checkpoint {name!r}; it has {', '.join(names)}")
    step = steps[-1] if name is None else names[name]
    if (damage := folders.verify(rundir.checkpoint(step))) is None:
        return step
    others = (rundir.checkpoint(other) for other in reversed(steps) if other != step)
    good = next((folder for folder in others if folders.verify(folder) is None), None)
    remedy = "no other checkpoint is whole; start again with --overwrite"
    if good is not None:
        remedy = f"go on from an earlier one with --resume --resume-from {good.name}"
    raise InputError(f"checkpoint {rundir.checkpoint(step)} is damaged ({damage}); {remedy}")


def _check_same_data(rundir: RunDir, job: Job, cache: Path, tokens: str) -> None:
    """Refuse other training tokens than those with the checksum `tokens`, and say what differs."""
    if job.data.train.sha256 == tokens:
        return
    tokenizer = load_tokenizer(rundir.tokenizer).get_vocab() != job.tokenizer.get_vocab()
    before = find_prepared(cache, tokens)
    sizes = [f"{d.train.documents:,} documents, {d.train.tokens:,} tokens" for d in (before, job.data) if d]
    raise InputError(
        f"the text{' and the tokenizer have' if tokenizer else ' has'} changed since {rundir.path} was started: "
        f"{'; now '.join(sizes)}; put the old files back, name where they are now with --data or --tokenizer, "
        "or start a new run in another folder"
    )


def _run(job: Job, rundir: RunDir, counters: Counters, quiet: bool, jobs: int) -> dict[str, Any]:
    train = job.config.train
    if counters.steps < train.steps:
        counters.note_machine(jobs, job.device)
    log = open_log(rundir, train.steps, counters.steps, quiet)
    try:
        flops = count_step(job)
        if job.controller.schedule.weighs and not counters.steps:
            begin = time.perf_counter()
            job.controller.time_layers()
            counters.seconds_measure += time.perf_counter() - begin
            log.costs(job.controller.schedule.costs)
        if ranks.is_main() and not quiet:
            for line in opening(job, rundir, flops, counters):
                log.say(line)
        with StopRequest() as stop:
            trainer = Trainer(job, rundir, log, flops, counters, stop)
            if counters.steps < train.steps:
                warm_up(job)
            try:
                trainer.train()
            except TrainingStopped:
                again = f"switchable pretrain --out {rundir.path} --resume"
                log.say(f"stopped and saved at step {counters.steps}; go on with: {again}")
                raise
        return finish(trainer)
    finally:
        log.close()


def count_step(job: Job) -> StepFlops:
    """Return the FLOPs of a step, all its micro-batches on all ranks together."""
    train = job.config.train
    rows = micro_rows(train)
    return count(job.model, split(job.batch(0), rows)[0]).times(train.batch_size // rows)


def finish(trainer: Trainer) -> dict[str, Any]:
    """Export, measure the speed of both modes, and write the summary."""
    job, rundir = trainer.job, trainer.rundir
    checkpoint.save(rundir.final, job.model, tokenizer=job.tokenizer)
    trainer.log.say("timing steps of each kind in turns")
    validation = trainer.validation or trainer.validate()
    figures = dataclasses.asdict(summarise(trainer.counters, job, trainer.flops, validation))
    if ranks.is_main():
        write_json(rundir.summary, figures)
        _show_samples(trainer, validation)
    return figures


def _show_samples(trainer: Trainer, validation: Mapping[str, float | None]) -> None:
    """Let the finished model continue a text in the modes that were validated."""
    job, prompt = trainer.job, trainer.job.config.train.sample_prompt
    if prompt is None:
        return
    if isinstance(job.model, FSDPModule):
        trainer.log.say(f"no sample of a sharded model; see: switchable generate {trainer.rundir.path}")
        return
    with kept_modes(job.model):
        job.model.eval()
        for mode in (m for m in ("dense", "sparse") if validation[f"val_loss_{m}"] is not None):
            text = write(job.model, job.tokenizer, prompt, mode, sampling=Sampling(max_new_tokens=60)).text
            trainer.log.say(f"--- text from {mode} mode ---\n{text}")
