"""The command line in a process of its own, and what every refusal looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch import cli, run_forked

SMALL = """
model: {d_model: 16, num_layers: 2, num_heads: 2}
data: {vocab_size: 300}
train: {steps: 12, batch_size: 4, sequence_length: 16, log_every: 4, eval_every: 0, checkpoint_every: 4,
        eval_tokens: 256, probe_tokens: 128, threads: 1}
switch: {recipe: early, num_experts: 8, experts_per_token: 3, monitor_every: 3,
         stability_threshold: 0.0, max_activation_ratio: 1.0, min_mass_caught: 0.0, sparse_steps: 2}
"""
Command = Callable[..., subprocess.CompletedProcess[str]]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "switchable", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked(cli, *arguments, folder=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The error is for a user: exit code 2, a line or two, no traceback, and it says these words."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()
    assert len(message) <= 2, done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
