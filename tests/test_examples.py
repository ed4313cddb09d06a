"""Every script of `examples/` runs to its end, says its loss in both modes, and saves what it says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from launch import run_forked, script

ROOT = Path(__file__).parents[1]
NEEDS = {
    "trainer": "accelerate",
    "with_accelerate": "accelerate",
    "with_lightning": "lightning",
    "with_peft": "peft",
}
"""Packages, besides our own dependencies."""
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_saves(name: str, tmp_path: Path) -> None:
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"examples/{name}.py needs {package}")
    done = run_forked(script, str(ROOT / "examples" / f"{name}.py"), str(tmp_path / "saved"), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {
        mode: float(loss) for mode, loss in re.findall(r"(dense|sparse): loss ([\d.]+) nats", done.stdout)
    }
    assert set(losses) == {"dense", "sparse"}
    untrained = 6.24 if "nats per token" in done.stdout else 5.55  # log 512, log 256
    assert max(losses.values()) < untrained - 1
    assert f"saved in {tmp_path / 'saved'}" in done.stdout
    assert sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file()) > 100_000


def test_there_are_as_many_as_are_spoken_of() -> None:
    assert len(SCRIPTS) == 6
    assert set(NEEDS) <= set(SCRIPTS)
