"""Benchmarks report nothing false: they refuse what they cannot measure; their figures follow from what was timed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import ffn_sweep, memory, train_step
from benchmarks._ffn_layer import Shape
from benchmarks._memory import peak_bytes
from switchable.compute.cpu.llvm import this_machine
from switchable.compute.measured import Costs, Line
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.switching import controller
from switchable.timing import Times

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


@pytest.mark.skipif(this_machine() is None, reason="no loops for this processor")
@pytest.mark.parametrize(
    ("sparse", "active", "way"), [(1.0, 1.0, "dense"), (1.0, 0.5, "active"), (0.3, 0.5, "sparse")]
)
def test_the_sweep_times_the_way_that_a_run_would_take(
    sparse: float, active: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(512, 1.0, Line(active, 0.0), Line(sparse, 0.0))
    monkeypatch.setattr(controller, "costs_of_layers", lambda *_: (costs,))
    done: dict[str, tuple[str, float | None]] = {}
    layers: list[SwitchableFFN] = []

    def turns(calls: dict[str, Callable[[], object]], *_: object, **__: object) -> Times:
        for name, call in calls.items():
            call()
            for layer in layers:
                done[name] = layer.ssd.mode, layer.ssd.active_count.take(layer.ssd.d_ff)
        return Times({name: [1.0 + place] for place, name in enumerate(calls)})

    made = ffn_sweep._make_few_active
    monkeypatch.setattr(ffn_sweep, "take_turns", turns)
    monkeypatch.setattr(
        ffn_sweep, "_make_few_active", lambda layer, x: (layers.append(layer), made(layer, x))
    )
    row = ffn_sweep.row_of(Shape(512, 32, 128, 8, 2), "train", "float32")
    assert (row["chosen"], row["why"].split(",")[0]) == (way, "dense 1e+03 ms")
    mode, share = done[way]
    assert mode == ("sparse" if way == "sparse" else "dense")
    assert (share is None) == (way != "active")
    assert share is None or 0.05 < share < 0.15
    places = {
        "dense": 4,
        "active": 4,
        "sparse": 3,
    }  # dense, its module, sparse, what was chosen, that without router
    assert row["chosen_over_module"] == 2 / places[way]
    assert row["router_share"] == (0.0 if way == "sparse" else pytest.approx(1 - 5 / 4))


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


def test_memory_of_a_process_is_told_in_megabytes_and_over_float32() -> None:
    assert memory.report({"float32": 1000.0, "int8": 600.0, "int8_export": 400.0}) == {
        "float32_mb": 1000.0, "int8_mb": 600.0, "int8_export_mb": 400.0,
        "int8_over_float32": 0.6, "int8_export_over_float32": 0.4,
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_process_that_writes_not_of_its_parent(tmp_path: Path) -> None:
    memory._build(tmp_path, 64, 1, 512, None)
    here = torch.ones(2**28)  # 1.1 GB
    assert 150 < memory.peak_mb(str(tmp_path / "export"), "int8") < here.nbytes / 1e6


def test_the_peak_is_the_calls_own_whatever_garbage_is_freed_within_it() -> None:
    kept: list[object] = []

    def call() -> None:
        gc.collect()
        circle: list[object] = [torch.empty(4 * 2**18)]
        circle.append(circle)
        kept[:] = [circle]
        torch.empty(2 * 2**18)

    for _ in range(2):  # loading the profiler collects garbage too
        assert peak_bytes(call, kept.clear) == 6 * 2**20
