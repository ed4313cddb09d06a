"""A finished run, and commands given in its folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli.commands import SMALL, Command, run

from switchable.cli import main


@pytest.fixture(scope="session")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(SMALL)
    done = run(folder, "pretrain", "small.yaml", "--data", str(corpus), "--out", "run")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    needed = {
        "val_loss_dense",
        "val_loss_sparse",
        "flops_ratio",
        "sparse_fraction",
        "switches",
        "step_speedup_sparse",
    }
    assert needed <= figures.keys()
    assert figures["switches"] >= 2
    return folder


@pytest.fixture
def here(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Gives commands in this process, in the folder of the finished run."""
    monkeypatch.chdir(base)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))

    def give(*arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            code = main(list(arguments))
        except SystemExit as left:
            code = int(left.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return give
