"""The folder of a run: who may write in it, and what lies where.

    config.yaml   metrics.jsonl   tensorboard/   checkpoints/step-000100/ ...   final/   summary.json
    curves.png   report.html   probe.safetensors   snapshots/step-000012/ ...

One process writes at a time: it holds a lock that the operating system releases when the process dies.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from switchable.errors import InputError
from switchable.files import TEMPORARY, check_apart, check_name, remove, write_text


class FolderInUse(InputError):
    """Another process holds the lock of a run's folder."""


class RunDir:
    """Paths of a run's folder, which `acquire` makes, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.probe = path / "probe.safetensors"
        self.final = path / "final"
        self.tokenizer = path / "tokenizer"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.speed = path / "speed.png"
        self._launcher = path / "launcher"
        self.report = path / "report.html"
        self._lock = FileLock(path / "run.lock", timeout=0)

    def acquire(self) -> None:
        """Create the folder if need be and take its lock.

        Raises:
            FolderInUse: another process holds it.
            InputError: the path is not a folder that can be written.
        """
        check_name(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise FolderInUse(
                f"{self.path} is in use by another run; wait for it to end or choose another folder with --out"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be used as output folder: {error.strerror}; choose another"
            ) from None

    def in_use(self) -> bool:
        """Return whether another process holds the lock now (it may have changed by the time this returns)."""
        try:
            self.acquire()
        except FolderInUse:
            return True
        self.release()
        return False

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def claim(self) -> None:
        """Note which launcher (torchrun, a shell) runs this folder, so that a process it restarts may go on here."""
        write_text(self._launcher, _launcher())

    def is_ours(self) -> bool:
        """Return whether the launcher of this process is the one that ran this folder last."""
        return self._launcher.is_file() and self._launcher.read_text(encoding="utf-8") == _launcher()

    def contents(self) -> tuple[Path, ...]:
        """Return what a run leaves here, besides its configuration."""
        folders = (self.tensorboard, self.checkpoints, self.snapshots, self.final, self.tokenizer)
        return (*folders, self.metrics, self.summary, self.curves, self.speed, self.report, self.probe)

    def refuse_to_replace(self, overwrite: bool, sources: Iterable[Path | str]) -> None:
        """Raise InputError for a run that would replace another one, or something else, or what it reads."""
        for path in self.contents():
            check_apart(path, sources)
        if self.config.exists():
            if not overwrite:
                raise InputError(
                    f"{self.path} holds a run already; go on with it with --resume, replace it with --overwrite, "
                    "or choose another folder with --out"
                )
            return
        for path in self.contents():
            if path.exists():
                raise InputError(
                    f"{self.path} holds no run (no {self.config.name}) but {path.name}, which a run would replace; "
                    "choose another folder with --out"
                )

    def begin(self, config: str) -> None:
        """Remove what an earlier run left here, and write the configuration of the new one; the lock stays."""
        write_text(self.config, config)  # first: by it the folder is known as a run's
        for path in self.contents():
            remove(path)

    def go_back(self, step: int) -> None:
        """Remove checkpoints and snapshots of later steps: a run that goes on from `step` makes them again."""
        for place in (self.checkpoints, self.snapshots):
            for later, folder in steps_in(place).items():
                if later > step:
                    remove(folder)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return sorted(steps_in(self.checkpoints))

    def drop_old(self, keep: int) -> None:
        """Remove all checkpoints but the `keep` newest; 0 keeps all."""
        for step in self.steps()[:-keep] if keep > 0 else []:
            remove(self.checkpoint(step))

    def sweep(self) -> None:
        """Remove what a process that was killed left half done."""
        for place in (self.path, self.checkpoints, self.snapshots):
            for left in place.glob(TEMPORARY + "*"):
                remove(left)

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint taken after `step` steps."""
        return self.checkpoints / f"step-{step:06d}"

    def snapshot(self, step: int) -> Path:
        """Return the folder of the weights kept for `switchable study` after `step` steps."""
        return self.snapshots / f"step-{step:06d}"


def steps_in(folder: Path) -> dict[int, Path]:
    """Return the folders `step-000100` and so on in a folder, by step; none if there is no such folder."""
    found = folder.glob("step-*") if folder.is_dir() else []
    numbers = {path.name.removeprefix("step-"): path for path in found}
    return {int(number): path for number, path in numbers.items() if number.isdigit()}


def _launcher() -> str:
    return f"{socket.gethostname()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}\n"
