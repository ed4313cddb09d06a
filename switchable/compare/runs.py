"""The runs of a comparison: which there are, and whether their folders fit.

    DIR/<method>-s<seed>/     an ordinary run folder, as `switchable pretrain` makes it

A run is finished (it has a summary: nothing to do), begun (it has a checkpoint: resumed) or to be started. The
folder's lock decides who trains it, so a comparison may be started several times at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from switchable.compare.methods import UNCOMPARED, method_config, named
from switchable.config import RunConfig, changed, check_trainable, read_stored, to_dict
from switchable.errors import InputError
from switchable.files import read_json

IN_USE = 75
"""A worker's exit code where the folder is locked (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    method: str
    seed: int
    path: Path  # its folder
    config: RunConfig

    @property
    def name(self) -> str:
        """The folder's name, e.g. `ssd-s0`."""
        return self.path.name

    @property
    def starts_from(self) -> Path | None:
        """The folder of the run this one goes on from, if it does."""
        before = named(self.method).starts_from
        return None if before is None else folder(self.path.parent, before, self.seed)

    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.path / "summary.json").exists()

    def task(self, cache: Path, jobs: int) -> str:
        """Return what to tell the worker that shall train it."""
        paths = {"path": str(self.path), "cache": str(cache)}
        told = {"method": self.method, "seed": self.seed, "config": to_dict(self.config), "jobs": jobs}
        return json.dumps(told | paths)

    def summary(self) -> dict[str, Any]:
        """Return the figures of a finished run; InputError if the file is damaged."""
        file = self.path / "summary.json"
        try:
            return cast(dict[str, Any], read_json(file))
        except ValueError:
            why = "is damaged; remove it and start again: the run's last checkpoint is kept"
            raise InputError(f"{file} {why}") from None


def folder(out: Path, method: str, seed: int) -> Path:
    """Return the folder of a run."""
    return out / f"{method}-s{seed}"


def runs_of(config: RunConfig, methods: Sequence[str], seeds: Sequence[int], out: Path) -> list[Run]:
    """Return the runs of a comparison, seed by seed, each after the one it goes on from.

    Raises InputError for settings that cannot work, or a folder that holds a run with other settings.
    """
    needed = [before for name in methods if (before := named(name).starts_from) is not None]
    every = [(method, seed) for seed in seeds for method in dict.fromkeys([*needed, *methods])]
    runs = [Run(*each, folder(out, *each), method_config(config, *each)) for each in every]
    for run in runs:
        check_trainable(run.config)
        if difference := differs(run):
            raise InputError(
                f"{run.path} was trained with other settings ({'; '.join(difference)}); "
                "compare into another folder with --out, or remove that one"
            )
    return runs


def differs(run: Run) -> list[str]:
    """Return in which settings a run's folder differs from what it should hold; nothing if there is none yet."""
    stored = run.path / "config.yaml"
    if not stored.exists():
        return []
    lines = changed(read_stored(stored), run.config)
    return [line for line in lines if line.split(":")[0] not in {f"train.{name}" for name in UNCOMPARED}]


def others_finished(config: RunConfig, out: Path, besides: Sequence[Run]) -> list[Run]:
    """Return the finished runs in `out` that belong to the same comparison though they were not asked for now."""
    asked = {run.path for run in besides}
    found = []
    for summary in sorted(out.glob("*/summary.json")):
        method, _, seed = summary.parent.name.rpartition("-s")
        if not (seed.isascii() and seed.isdigit()) or summary.parent in asked:
            continue
        try:
            run = Run(method, int(seed), summary.parent, method_config(config, method, int(seed)))
            if not differs(run):
                found.append(run)
        except InputError:
            continue  # not of this comparison: a method or settings that this version does not know
    return found
