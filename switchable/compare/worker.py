"""The child process that trains one run of a comparison: `python -m switchable.compare.worker TASK`.

Its exit code is its answer: 0 finished, 2 unusable input (the reason is the last line of its log), `IN_USE` another
process is at that run, 128 + signal stopped and saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from switchable.compare.runs import Run
from switchable.config import from_dict, to_dict
from switchable.errors import InputError

IN_USE = 75
"""Exit code: the folder is locked (EX_TEMPFAIL of sysexits.h)."""


def task(run: Run, cache: Path, jobs: int) -> str:
    """Return what to tell a worker that shall train `run`."""
    return json.dumps(
        {
            "method": run.method,
            "seed": run.seed,
            "path": str(run.path),
            "config": to_dict(run.config),
            "cache": str(cache),
            "jobs": jobs,
        }
    )


def main() -> int:
    """Train the run that the only argument describes; return the exit code."""
    told = json.loads(sys.argv[1])
    run = Run(told["method"], told["seed"], Path(told["path"]), from_dict(told["config"]))
    # Loads torch, after what is needed to understand the task.
    from switchable.compare.training import train
    from switchable.store.rundir import FolderInUse
    from switchable.train.signals import TrainingStopped

    try:
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
