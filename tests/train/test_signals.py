"""A run that is asked to stop: the same request twice is one, and a person can still have it end at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support import small_run

from switchable.config import to_dict
from switchable.store import folders
from switchable.store.rundir import RunDir
from switchable.train.signals import PATIENCE, StopRequest


def test_signals_that_come_together_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("switchable.train.signals.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # scheduler and launcher
            signal.raise_signal(signum)
            now[0] += PATIENCE / 4
        assert stop.signum == signal.SIGTERM
        now[0] += 10 * PATIENCE
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_sigterms_leave_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    config = small_run(corpus, steps=100_000, checkpoint_every=100_000, eval_every=0, log_every=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "switchable", "pretrain", "run.yaml", "--out", str(out), "--quiet"]
    process = subprocess.Popen(
        [*command, "--cache", "cache"], cwd=tmp_path, env=os.environ, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (RunDir(out).metrics.exists() and RunDir(out).metrics.stat().st_size):
        assert time.monotonic() < until
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.communicate(timeout=120)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    (step,) = RunDir(out).steps()
    assert folders.verify(RunDir(out).checkpoint(step)) is None
