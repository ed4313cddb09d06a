"""Ctrl-C and SIGTERM ask a run to stop; the loop notices after its step, saves, and says how to go on."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

PATIENCE = 1.0
"""Seconds in which further signals are the same request: launchers and terminals send theirs more than once."""


class TrainingStopped(Exception):
    """The run was asked to stop and has saved a checkpoint; `args[0]` is the signal's number."""


class StopRequest:
    """Within the `with` block, SIGINT and SIGTERM set `signum` instead of ending the process.

    Any number of SIGTERMs is one request. Ctrl-C a second or more after the first signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a handler
        if not self.requested:
            self.signum, self._since = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._since >= PATIENCE:
            raise KeyboardInterrupt
