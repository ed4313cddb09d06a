"""How should a run end? One run is carried on from one checkpoint several times, each time with another end.

    python -m experiments.ending RUN [RUN ...] --step 2250 [--variants "from 0.92" ...] [--out DIR]
    python -m experiments.ending --list

Whole runs that differ in rounding alone end 0.003 to 0.006 nats apart, which is more than the choices at the end of a
run make. Branches of one checkpoint have all that comes before in common, and are compared with a branch whose last
step alone is sparse. The routers of each finished branch are then taught some more, its weights standing still, to
tell what sparse mode lacks: routers that know their model, or a model that knows its routers.

    dense, sparse    validation loss in either mode (nats per token), mean over the runs
    refitted         the same in sparse mode after the routers' extra lessons, with as many experts
    experts          mean share of its experts that a layer computes in sparse mode, dense layers being 1
    sparse steps     of the whole run

RUNs are run folders that still hold a checkpoint of that step. Branches are run folders too: what is finished is not
trained again, what was interrupted goes on. The last line is one JSON document. Findings: docs/log/quality.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.recipe import configure, expert_fraction
from switchable.cli.flags import default_cache
from switchable.config import read_stored, to_dict
from switchable.errors import InputError
from switchable.train.signals import TrainingStopped

Settings = Mapping[str, Any]

VARIANTS: dict[str, Settings] = {
    "last step": {"min_dense_fraction": 0.9997},
    "from 0.96": {"min_dense_fraction": 0.96},
    "from 0.92": {"min_dense_fraction": 0.92},
    "from 0.85": {"min_dense_fraction": 0.85},
    "from 0.92, 95 % of the mass": {"min_dense_fraction": 0.92, "mass_target": 0.95},
    "from 0.92, 7 to 1": {"min_dense_fraction": 0.92, "sparse_steps": 7},
    "from 0.92, 1 to 1": {"min_dense_fraction": 0.92, "sparse_steps": 1},
    "from 0.92, router from a quarter of the tokens": {
        "min_dense_fraction": 0.92,
        "router_token_fraction": 0.25,
    },
}
"""Variant -> settings that differ from the run's."""

LESSON_TOKENS = 262_144
"""Training tokens from which the routers of a finished branch learn some more."""
LESSON_RATE = 1e-3
"""Their learning rate at the beginning."""


def branch(run: Path, step: int, settings: Settings, folder: Path, cache: Path) -> dict[str, Any]:
    """Carry a run on from a checkpoint with other settings, in a folder of its own; return its summary."""
    from switchable.store.rundir import RunDir
    from switchable.train.pretrain import resume

    rundir = RunDir(folder)
    if not rundir.summary.exists():
        if not folder.exists():
            fork(run, step, settings, folder)
        resume(folder, {}, cache, quiet=True)
    summary: dict[str, Any] = json.loads(rundir.summary.read_text(encoding="utf-8"))
    return summary


def fork(run: Path, step: int, settings: Settings, folder: Path) -> None:
    """Make a run folder that stands where another stood at a checkpoint, but with other settings.

    Raises:
        InputError: the run has no such checkpoint.
    """
    from switchable.files import TEMPORARY, write_text
    from switchable.store.rundir import RunDir

    source = RunDir(run)
    if step not in source.steps():
        there = ", ".join(map(str, source.steps())) or "none"
        raise InputError(f"{run} holds no checkpoint of step {step}; it has: {there}")
    config = read_stored(source.config)
    changed = to_dict(configure(config, settings, config.train.seed))
    half = RunDir(folder.with_name(TEMPORARY + folder.name))
    if half.path.exists():
        shutil.rmtree(half.path)
    shutil.copytree(source.checkpoint(step), half.checkpoint(step))
    shutil.copytree(source.tokenizer, half.tokenizer)
    for file in (source.metrics, source.probe):
        shutil.copy(file, half.path)
    write_text(half.config, yaml.safe_dump(changed, sort_keys=False))
    half.path.rename(folder)


def refitted(folder: Path, cache: Path) -> float | None:
    """Teach the routers of a finished run some more, and return its loss in sparse mode; None if it has none."""
    from switchable.adapt.calibrate import calibrate
    from switchable.infer.loss import loss_in_mode
    from switchable.store.restore import restore_training
    from switchable.store.rundir import RunDir
    from switchable.train.setup import probe_inputs, set_up

    rundir = RunDir(folder)
    job = set_up(read_stored(rundir.config), cache, quiet=True)
    state, _ = restore_training(rundir.checkpoint(rundir.steps()[-1]), job.model, job.optimizer)
    job.controller.load_state_dict(state)
    if not any(job.controller.state.takes_part):
        return None
    train = job.config.train
    lessons = range(LESSON_TOKENS // (train.batch_size * train.sequence_length))
    calibrate(job.model, probe_inputs(job.model, [job.batch(i) for i in lessons], LESSON_TOKENS), LESSON_RATE)
    return loss_in_mode(job.model, job.validation, "sparse")


def figures(summary: Mapping[str, Any], loss_refitted: float | None) -> dict[str, float | None]:
    """Return the figures of one branch."""
    return {
        "loss_dense": summary["val_loss_dense"],
        "loss_sparse": summary["val_loss_sparse"],
        "loss_sparse_refitted": loss_refitted,
        "expert_fraction": expert_fraction(summary),
        "sparse_fraction": summary["sparse_fraction"],
    }


def carry_on(
    runs: list[Path], step: int, variants: list[str], out: Path, cache: Path
) -> dict[str, dict[str, Any]]:
    """Train and measure every branch; return variant -> run -> its figures."""
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        rows = found[variant] = {}
        for run in runs:
            folder = out / f"{run.name}_{variant.replace(' ', '_').replace('%', 'percent')}"
            summary = branch(run, step, VARIANTS[variant], folder, cache)
            rows[run.name] = figures(summary, refitted(folder, cache))
        print(line(variant, list(rows.values())), flush=True)
    return found


def line(variant: str, rows: list[dict[str, float | None]]) -> str:
    """Return a row of the table: means over the runs."""
    cells = []
    for figure, form in zip(rows[0], (".4f", ".4f", ".4f", ".1%", ".1%"), strict=True):
        values = [value for row in rows if (value := row[figure]) is not None]
        cells.append(f"{statistics.fmean(values):{form}}" if len(values) == len(rows) else "—")
    return f"{variant:48}" + "".join(f"{cell:>13}" for cell in cells)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--list", action="store_true", help="show the variants")
    parser.add_argument("--step", type=int, help="checkpoint to carry on from")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/ending"), help="folder (default %(default)s)")
    args = parser.parse_args()
    if bool(args.runs) != (args.step is not None) or len({run.name for run in args.runs}) < len(args.runs):
        parser.error("give RUNs of different names and the --step to carry them on from, or --list alone")
    if args.list or not args.runs:
        print(
            "\n".join(
                f"{variant}: {dict(settings) or 'as the run'}" for variant, settings in VARIANTS.items()
            )
        )
        return 0
    heads = ("dense", "sparse", "refitted", "experts", "sparse steps")
    print(f"{'':48}" + "".join(f"{head:>13}" for head in heads))
    try:
        found = carry_on(args.runs, args.step, args.variants or list(VARIANTS), args.out, default_cache())
    except InputError as error:
        print(f"ending: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as stopped:
        print("ending: stopped and saved; the same command goes on", file=sys.stderr)
        return 128 + int(stopped.args[0])
    print(json.dumps({"experiment": "ending", "step": args.step, "variants": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
