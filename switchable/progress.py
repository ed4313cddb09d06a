"""How far a long job has come: a live line on a terminal, elsewhere a line every ten seconds (both on stderr).

with progress_bar("tokenizing", "B", total) as bar: bar.update(n)
for source in progress_bar("measuring", "checkpoint", over=sources): ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines; a job that is done sooner prints none
QUIET_SECONDS = 2.0  # a job that is done sooner shows nothing on a terminal


def say(text: str, show: bool = True) -> None:
    """Print a line on standard error, above the bars that are there."""
    if show:
        tqdm.write(text, file=sys.stderr)


class _Lines(tqdm):  # type: ignore[type-arg]
    """tqdm's counts and figures, as lines of a log."""

    _said = 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
        """Print a line if the last one is old enough; tqdm calls this several times a second."""
        now = time.time()  # tqdm's clock
        if msg is None and now - max(self._said, getattr(self, "start_t", now)) >= EVERY:
            self._said = now
            print(self, file=sys.stderr, flush=True)

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: a printed line stays."""

    def close(self) -> None:
        """End without a line."""
        self.sp = None
        super().close()


def progress_bar(
    what: str, unit: str, total: float | None = None, show: bool = True, over: Iterable[Any] | None = None,
    **look: Any,
) -> Any:  # fmt: skip
    """Return a tqdm bar: to `update`, to use as a context, or to iterate over where `over` is given.

    `what` names the job, `unit` what is counted; bytes (`"B"`) are scaled. `total` is how much there is; None: unknown,
    or the length of `over`. Nothing is shown without `show`. `look` are further settings of tqdm.
    """
    settings: dict[str, Any] = {"leave": False, "unit_scale": unit == "B", "delay": QUIET_SECONDS} | look
    settings |= {"desc": what, "unit": unit, "total": total, "disable": not show}
    if sys.stderr.isatty():
        return tqdm(over, dynamic_ncols=True, **settings)
    return _Lines(over, ncols=0, **settings)
