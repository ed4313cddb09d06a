"""Saving beside training: the contents are copied while training waits, and written while it goes on.

One checkpoint is under way at a time. What went wrong with it is raised, on all ranks, by the next `start` or `wait`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from switchable import ranks
from switchable.store import checkpoint
from switchable.store.contents import Contents


class Saver:
    """Writes checkpoints in a thread of its own. Use it in a `with` block: the end waits for the last checkpoint."""

    def __init__(self) -> None:
        # The thread talks to the other ranks' threads. A group of its own keeps its messages apart from training's.
        self._group = ranks.side_group()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None

    def start(self, folder: Path, contents: Contents, then: Callable[[], None]) -> None:
        """Write `contents` as the checkpoint `folder`, and do `then` on rank 0 when it stands.

        Raises:
            InputError: the checkpoint before this one could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, folder, contents, then)

    def _write(self, folder: Path, contents: Contents, then: Callable[[], None]) -> None:
        checkpoint.write(folder, contents, self._group)
        if ranks.is_main():
            then()

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises:
            InputError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # An error of training is raised as it is: the checkpoint is whole or absent either way.
            if kind is None:
                self.wait()
        finally:
            # After an error another rank may be gone, and the thread would wait for its answer for ever.
            self._thread.shutdown(wait=kind is None or self._group is None)
