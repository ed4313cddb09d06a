"""The child process that trains one run of a comparison: `python -m switchable.compare.worker TASK`.

Its exit code is its answer: 0 finished, 2 unusable input (the reason is the last line of its log), `IN_USE` another
process is at that run, 128 + signal stopped and saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from switchable.compare.baselines import VARIANTS
from switchable.compare.from_dense import make_from_dense
from switchable.compare.methods import UNCOMPARED
from switchable.compare.runs import IN_USE, Run
from switchable.config import from_dict
from switchable.errors import InputError
from switchable.files import full_disk_told
from switchable.store.rundir import FolderInUse, RunDir
from switchable.study.report import write_run_report
from switchable.train.pretrain import pretrain, resume
from switchable.train.setup import SSD
from switchable.train.signals import TrainingStopped


def train(run: Run, cache: Path, jobs: int) -> None:
    """Start a run or go on with it by the method's own means, unless it is finished; `jobs` at a time are noted.

    Raises:
        FolderInUse: another process is at it.
        InputError: settings, data or a checkpoint are unusable.
        TrainingStopped: stopped by a signal, after saving.
    """
    if run.finished():
        return
    variant = VARIANTS.get(run.method.partition("@")[0], SSD)
    if run.starts_from is not None:
        make_from_dense(run, cache, jobs)
    elif (run.path / "config.yaml").exists() and RunDir(run.path).steps():
        changes = {name: getattr(run.config.train, name) for name in UNCOMPARED}
        resume(run.path, changes, cache, jobs=jobs, variant=variant)
    else:
        pretrain(run.config, run.path, cache, overwrite=True, jobs=jobs, variant=variant)
    write_run_report(run.path)


def main() -> int:
    """Train the run that the only argument describes; return the exit code."""
    told = json.loads(sys.argv[1])
    run = Run(told["method"], told["seed"], Path(told["path"]), from_dict(told["config"]))
    try:
        with full_disk_told(f"training {run.path}", "what was saved stands. Free some space and start again"):
            train(run, Path(told["cache"]), told["jobs"])
    except FolderInUse:
        return IN_USE
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except TrainingStopped as stopped:
        return 128 + int(stopped.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
