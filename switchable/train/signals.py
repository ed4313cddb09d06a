"""Ctrl-C and SIGTERM ask a run to stop; the loop notices after its step, saves, and says how to go on."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class TrainingStopped(Exception):
    """The run was asked to stop and has saved a checkpoint; `args[0]` is the signal's number."""


class StopRequest:
    """Within the `with` block, SIGINT and SIGTERM set `signum` instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a handler
        if self.requested:
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)
        self.signum = signum
