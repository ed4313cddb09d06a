"""The fault harness on a handful of lives: its own checks can fail, and the run survives."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from experiments import faults
from experiments.fault_harness import Harness
from experiments.fault_worker import Trap
from switchable.store.rundir import RunDir

STEPS = 16


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    made = Harness(tmp_path_factory.mktemp("faults"), seed=1)
    assert made.finish(made.attempt("undisturbed", STEPS)) == [0]
    yield made
    assert not made.failures


@pytest.mark.parametrize(
    "trap", [Trap("step", 6, 0.5), Trap("save", 2, 0.3), Trap("switch", 2, 0.5)], ids=lambda trap: trap.phase
)
def test_a_killed_run_goes_on_bitwise(harness: Harness, trap: Trap) -> None:
    attempt = harness.attempt(f"killed-{trap.phase}", STEPS)
    assert harness.finish(replace(attempt, trap=trap)) == [-signal.SIGKILL]
    assert harness.finish(attempt) == [0]
    assert harness.same(f"killed-{trap.phase}", "undisturbed")


def test_a_damaged_checkpoint_is_named(harness: Harness) -> None:
    assert faults.damage(harness, STEPS, "bit-flipped")


def test_a_rank_that_stalls_does_not_hold_the_other(harness: Harness) -> None:
    assert harness.finish(harness.attempt("undisturbed-2", STEPS), world_size=2) == [0, 0]
    assert faults.lost_rank(harness, STEPS, signal.SIGSTOP)


def test_the_harness_sees_a_difference_and_what_is_left_behind(harness: Harness) -> None:
    attempt = harness.attempt("changed", STEPS)
    assert harness.finish(attempt) == [0]
    other = Harness.__new__(Harness)
    other.folder, other.failures = harness.folder, []
    rundir = RunDir(Path(attempt.out))
    file = rundir.final / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    (rundir.path / ".tmp-left").write_text("")
    assert not other.same("changed", "undisturbed")
    assert len(other.failures) == 2
    assert ".tmp-left" in other.failures[0]
    assert "not bitwise" in other.failures[1]
