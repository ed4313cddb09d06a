"""One attempt of a run that is going to be hit: the process that `experiments.faults` starts, and its traps.

A trap wraps a function of this process alone. It waits for the function's nth call and strikes at a moment drawn at
random from the call's usual duration, from another thread: the process dies as if somebody else had killed it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from switchable.config import RunConfig
from switchable.errors import InputError
from switchable.store import checkpoint, restore, tensorfile
from switchable.store.rundir import RunDir
from switchable.switching.controller import Controller
from switchable.train.loop import Trainer
from switchable.train.parallel import process_group
from switchable.train.pretrain import pretrain, resume
from switchable.train.signals import TrainingStopped

PHASES: dict[str, tuple[Any, str]] = {
    "step": (Trainer, "_step"),
    "switch": (Controller, "_measure"),
    "save": (checkpoint, "write"),
    "resume": (restore, "restore_training"),
}
"""What can be hit: (object, name of its function)."""


@dataclass(frozen=True)
class Trap:
    """When and how to strike."""

    phase: str
    call: int
    """At which call of the phase's function, counted from 1."""
    share: float
    """After which share of the call's usual duration."""
    signum: int = signal.SIGKILL


@dataclass(frozen=True)
class Attempt:
    """What a process shall do."""

    config: RunConfig
    out: str
    cache: str
    durations: Any
    """Shared array: the usual seconds of each phase, in the order of PHASES."""
    progress: Any
    """Shared integer: steps done so far."""
    trap: Trap | None = None
    resume_from: str | None = None
    full_disk_after: int | None = None
    """Bytes that checkpoints may still write in this process before the disk is full."""
    jumping_clock: int | None = None
    """Seed of a wall clock that jumps by up to a day, to and fro."""


def run(
    attempt: Attempt, rank: int = 0, world_size: int = 1, port: int = 0, rank_timeout: float = 60.0
) -> None:
    """Start or resume the run; leave with the command line's exit code."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    out, cache = Path(attempt.out), Path(attempt.cache)
    errors = out.with_name(f"{out.name}.stderr-{rank}")
    with errors.open("w", buffering=1) as stream, contextlib.redirect_stderr(stream):
        _prepare(attempt)
        try:
            with process_group(rank_timeout):
                if attempt.resume_from or RunDir(out).steps():
                    resume(out, {}, cache, attempt.resume_from)
                else:
                    pretrain(attempt.config, out, cache, overwrite=True)
        except InputError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        except TrainingStopped as stopped:
            sys.exit(128 + int(stopped.args[0]))
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(os.EX_TEMPFAIL)  # as the command line does when a rank is lost


def _prepare(attempt: Attempt) -> None:
    """Wrap what is to be watched, timed or hit, in this process."""
    for i, (phase, (owner, name)) in enumerate(PHASES.items()):
        usual = attempt.durations[i]
        wrapper = _Watched(getattr(owner, name), phase, usual, attempt)
        setattr(owner, name, wrapper.method())
    if attempt.full_disk_after is not None:
        tensorfile.write = _filling(tensorfile.write, attempt.full_disk_after)
    if attempt.jumping_clock is not None:
        generator, clock = random.Random(attempt.jumping_clock), time.time
        time.time = lambda: clock() + generator.uniform(-86400, 86400)


class _Watched:
    """A function that counts its calls, notes how long they take, and springs the trap."""

    def __init__(self, work: Callable[..., Any], phase: str, usual: float, attempt: Attempt) -> None:
        self._work, self._phase, self._usual, self._attempt = work, phase, usual, attempt
        self._calls = 0

    def method(self) -> Callable[..., Any]:
        @functools.wraps(self._work)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            trap = self._attempt.trap
            if trap is not None and trap.phase == self._phase and trap.call == self._calls:
                strike = threading.Timer(trap.share * self._usual, os.kill, (os.getpid(), trap.signum))
                strike.daemon = True
                strike.start()
            begin = time.perf_counter()
            result = self._work(*args, **kwargs)
            index = list(PHASES).index(self._phase)
            self._attempt.durations[index] = time.perf_counter() - begin
            if self._phase == "step":
                self._attempt.progress.value = args[0].counters.steps
            return result

        return call


def _filling(write: Callable[..., None], room: int) -> Callable[..., None]:
    """A `tensorfile.write` on a disk with `room` bytes left: it writes what fits, then fails as the kernel would."""
    left = [room]

    def limited(path: Path, pieces: Any) -> None:
        size = path.stat().st_size
        write(path, pieces)
        left[0] -= size
        if left[0] < 0:
            os.truncate(path, max(0, size + left[0]))
            raise OSError(errno.ENOSPC, "No space left on device")

    return limited
