"""The folder of a run: who may write in it, and what lies where.

    config.yaml   metrics.jsonl   tensorboard/   checkpoints/step-000100/ ...   final/   summary.json
    curves.png   report.html   probe.safetensors   snapshots/step-000012/ ...

One process writes at a time (a lock that the operating system releases when the process dies, however it dies).
Files are written under a temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from switchable.errors import InputError

TEMPORARY = ".tmp-"
"""Prefix of names that are not complete yet."""


class FolderInUse(InputError):
    """Another process holds the lock of a run's folder."""


class RunDir:
    """Paths of a run's folder, and its lock.

    Args:
        path: the folder; made by `create`.
    """

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
        self._launcher = path / "launcher"
        self.report = path / "report.html"
        self._lock = FileLock(path / "run.lock", timeout=0)

    def acquire(self) -> None:
        """Create the folder if need be and take its lock.

        Raises:
            FolderInUse: another process holds it.
            InputError: the path is not a folder that can be written.
        """
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
        """Note which launcher (torchrun, a shell) runs this folder now: what it restarts may go on here."""
        write_text(self._launcher, _launcher())

    def is_ours(self) -> bool:
        """Return whether the launcher of this process is the one that ran this folder last."""
        return self._launcher.is_file() and self._launcher.read_text(encoding="utf-8") == _launcher()

    def clear(self) -> None:
        """Remove what an earlier run left here; the lock stays."""
        for folder in (self.tensorboard, self.checkpoints, self.snapshots, self.final, self.tokenizer):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.metrics, self.summary, self.curves, self.report, self.probe):
            file.unlink(missing_ok=True)

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


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so that no half of it ever stands under it."""
    if path.is_dir() and not path.name.startswith(TEMPORARY):
        doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        path = doomed
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk: a new name in it survives a power cut from then on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def is_no_space(error: BaseException) -> bool:
    """Return whether an error says that the disk is full (safetensors reports it as text)."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return (
        getattr(error, "errno", None) in codes or "os error 28" in str(error) or "No space left" in str(error)
    )
