"""How one run of a comparison is trained, by the method's own means."""

from __future__ import annotations

from pathlib import Path

from switchable.compare.baselines import VARIANTS
from switchable.compare.cut import cut
from switchable.compare.methods import UNCOMPARED
from switchable.compare.runs import Run
from switchable.config import to_dict
from switchable.store.rundir import RunDir
from switchable.study.report import write_run_report
from switchable.train.pretrain import pretrain, resume
from switchable.train.setup import SSD


def train(run: Run, cache: Path, jobs: int) -> None:
    """Start a run or go on with it, unless it is finished.

    Args:
        run: which.
        cache: folder for token files.
        jobs: runs that share the machine at this time, to be noted.

    Raises:
        FolderInUse: another process is at it.
        InputError: settings, data or a checkpoint are unusable.
        TrainingStopped: stopped by a signal, after saving.
    """
    if run.finished():
        return
    variant = VARIANTS.get(run.method.partition("@")[0], SSD)
    if run.starts_from is not None:
        cut(run, cache, jobs)
    elif (run.path / "config.yaml").exists() and RunDir(run.path).steps():
        train_settings = to_dict(run.config)["train"]
        resume(
            run.path, {name: train_settings[name] for name in UNCOMPARED}, cache, jobs=jobs, variant=variant
        )
    else:
        pretrain(run.config, run.path, cache, overwrite=True, jobs=jobs, variant=variant)
    write_run_report(run.path)
