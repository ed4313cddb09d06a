"""Benchmarks report nothing false: they refuse what they cannot measure; their figures follow from what was timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_step
from switchable.ffn.convert import layers_of

ROOT = Path(__file__).parents[1]


def test_without_a_gpu_make_gpu_says_so_in_one_line() -> None:
    before = sorted((ROOT / "benchmarks/results").iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none here\n"
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before
    assert "\ngpu: $(READY)\n\t@$(BIN)/python -m benchmarks.gpu\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_measured_over_the_best_dense_one(precision: str) -> None:
    found = train_step.measure((64, 1, 2), precision, rounds=1, device="cpu")
    assert isinstance(found, dict)
    dense = ["dense float32", *(["dense autocast", "dense weights"] if precision == "bfloat16" else [])]
    sparse = [name.replace("dense", "sparse") for name in dense[-2:]]
    ms = found["ms"]
    assert list(ms) == [*dense, *sparse]
    # One turn: the ratio of the medians is that of the turn.
    best = min(ms[name] for name in dense) / min(ms[name] for name in sparse)
    assert found["step_speedup"] == pytest.approx(best)
    assert 0 < found["ffn_share"] < 1
    saved = found["ffn_share"] * (1 - 1 / found["ffn_speedup"])
    assert found["amdahl_bound"] == pytest.approx(1 / (1 - saved))
    assert found["step_share_of_amdahl"] == pytest.approx(best * (1 - saved))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_is_timed_where_sparse_mode_computes_something_else(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = train_step.Steps((64, 1, 1), precision)
    assert steps.errors() == []
    layer = type(layers_of(steps.models["float32"])[0])
    sparse = layer._sparse
    monkeypatch.setattr(layer, "_sparse", lambda self, x_BSD: 1.2 * sparse(self, x_BSD))
    assert [error.partition(":")[0] for error in steps.errors()] == [
        name for name in steps.contenders() if name.startswith("sparse")
    ]
