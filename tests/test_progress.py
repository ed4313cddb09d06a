"""A long job says how far it is: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest
from tqdm import tqdm

from switchable import progress
from switchable.progress import progress_bar


def lines_of(monkeypatch: pytest.MonkeyPatch, every: float, show: bool = True) -> list[str]:
    """What a job of 4 steps of 20 ms prints where standard error is no terminal."""
    log = io.StringIO()
    monkeypatch.setattr(progress, "EVERY", every)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar("working", "step", 4, show, mininterval=0, miniters=1) as bar:
        for _ in range(4):
            time.sleep(0.02)
            bar.update()
        tqdm.write("said meanwhile", file=log)
    assert "\r" not in log.getvalue()
    return log.getvalue().splitlines()


def test_elsewhere_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    *figures, last = lines_of(monkeypatch, every=0.03)
    assert last == "said meanwhile"
    assert [line.split(" [")[0] for line in figures] == ["working:  50% 2/4", "working: 100% 4/4"]


def test_a_short_or_quiet_job_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, every=10.0) == ["said meanwhile"]
    assert lines_of(monkeypatch, every=0.01, show=False) == ["said meanwhile"]


def test_on_a_terminal_the_line_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    assert list(progress_bar("working", "step", over=[1, 2], file=terminal)) == [1, 2]
    assert "\rworking:   0%" in terminal.getvalue()
