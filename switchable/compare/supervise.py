"""Train the runs of a comparison in child processes, some at a time, and stop them all cleanly when asked to.

Each child has its own session, so that Ctrl-C reaches this process alone, which then asks every child once to save
and end. A run that another process holds is waited for, and taken over if that process dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from switchable.compare.runs import IN_USE, Run
from switchable.progress import say
from switchable.store.rundir import RunDir
from switchable.train.signals import StopRequest

POLL_SECONDS = 0.25
RETRY_SECONDS = 2.0


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    log: Path
    shown: int  # bytes of the log that were on it before, or have been shown


class Supervisor:
    """Trains runs, `jobs` at a time with `threads` CPU threads each; a run comes after the one it goes on from."""

    def __init__(self, runs: Sequence[Run], cache: Path, jobs: int, threads: int, quiet: bool) -> None:
        self.cache, self.jobs, self.threads, self.shows = cache, jobs, threads, not quiet
        self.failed: dict[str, str] = {}
        """Name of a run -> why it failed."""
        self._pending = [run for run in runs if not run.finished()]
        self._active: dict[Run, _Child] = {}
        self._not_before: dict[Run, float] = {}
        if finished := [run.name for run in runs if run.finished()]:
            say(f"finished already: {', '.join(finished)}", self.shows)

    def train(self) -> int | None:
        """Train all; return None, or the number of the signal that stopped it."""
        with StopRequest() as stop:
            try:
                while (self._pending or self._active) and not stop.requested:
                    self._start()
                    time.sleep(POLL_SECONDS)
                    self._collect()
            finally:
                # Whatever ends this process, no child is left behind.
                self._stop()
            return stop.signum

    def _start(self) -> None:
        for run in list(self._pending):
            if len(self._active) == self.jobs:
                return
            if run.finished():
                say(f"{run.name}: finished by another process", self.shows)
                self._pending.remove(run)
            elif self._ready(run):
                self._pending.remove(run)
                self._active[run] = self._launch(run)

    def _ready(self, run: Run) -> bool:
        before = run.starts_from
        if before is not None and before.name in self.failed:
            self._pending.remove(run)
            self._fail(run, f"it goes on from {before.name}, which failed")
            return False
        if before is not None and not (before / "summary.json").exists():
            return False
        if time.monotonic() < self._not_before.get(run, 0.0):
            return False
        if RunDir(run.path).in_use():
            self._wait_for(run)
            return False
        return True

    def _wait_for(self, run: Run) -> None:
        """Look again later at a run that another process is training."""
        if run not in self._not_before:
            say(f"{run.name}: another process is training it; waiting for it", self.shows)
        self._not_before[run] = time.monotonic() + RETRY_SECONDS

    def _launch(self, run: Run) -> _Child:
        run.path.mkdir(parents=True, exist_ok=True)
        log = run.path / "log.txt"
        shown = log.stat().st_size if log.exists() else 0
        libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = os.environ | dict.fromkeys(libraries, str(self.threads))
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "switchable.compare.worker", run.task(self.cache, self.jobs)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return _Child(process, log, shown)

    def _collect(self) -> None:
        for run, child in list(self._active.items()):
            code = child.process.poll()
            self._relay(run, child)
            if code is None:
                continue
            del self._active[run]
            if code == IN_USE:
                # Another process was quicker.
                self._wait_for(run)
                self._pending.append(run)
            elif code == 0 or run.finished():  # some libraries crash while a process ends
                say(f"{run.name}: finished", self.shows)
            elif code == 2:
                last = child.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                self._fail(run, last or f"it left nothing in {child.log}")
            else:
                self._fail(run, f"it ended with code {code}; {child.log} says why")

    def _stop(self) -> None:
        """Ask the children that are still training to save and end, and wait for them."""
        if self._active:
            say("stopping: every run saves a checkpoint first ...", self.shows)
        for child in self._active.values():
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        for run, child in self._active.items():
            child.process.wait()
            self._relay(run, child)

    def _fail(self, run: Run, why: str) -> None:
        self.failed[run.name] = why
        say(f"{run.name}: failed: {why}", self.shows)

    def _relay(self, run: Run, child: _Child) -> None:
        """Show the complete lines that a child has added to its log."""
        with child.log.open("rb") as file:
            file.seek(child.shown)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        child.shown += len(complete)
        for line in complete.decode("utf-8", errors="replace").split("\n")[:-1]:
            say(f"{run.name}: {line}", self.shows)
