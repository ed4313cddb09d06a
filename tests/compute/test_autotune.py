"""`auto`: what it measures, what it remembers, and that a broken table never breaks a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compute.problems import Case, problem

from switchable.compute import shape as shapes
from switchable.compute import stopwatch
from switchable.compute.autotune import Table, cache_path
from switchable.compute.shape import Shape
from switchable.compute.stopwatch import measure

SHAPE = Shape(tokens=100, d_model=32, d_ff=64, num_experts=8, experts_per_token=2)


def known(shape: Shape, seconds: dict[int, dict[str, float]]) -> Table:
    """A table in memory that knows some numbers of tokens."""
    return Table(None, {replace(shape, tokens=tokens).key: times for tokens, times in seconds.items()})


def test_sizes_between_two_powers_of_two_ask_both() -> None:
    def sizes(tokens: int) -> list[int]:
        return [shape.tokens for shape in replace(SHAPE, tokens=tokens).measured_at]

    assert sizes(100) == [64, 128]
    assert sizes(64) == [64]
    assert sizes(1) == [1]
    assert sizes(100_000) == [shapes.LARGEST]


def test_sparse_must_win_at_both_neighbours_and_by_the_margin() -> None:
    wins, loses, ties = (
        {"dense": 1.0, "sorted": 0.5},
        {"dense": 1.0, "sorted": 1.1},
        {"dense": 1.0, "sorted": 0.98},
    )
    assert known(SHAPE, {64: wins, 128: wins}).choose(SHAPE) == "sorted"
    assert known(SHAPE, {64: wins, 128: loses}).choose(SHAPE) == "dense"
    assert known(SHAPE, {64: loses, 128: wins}).choose(SHAPE) == "dense"
    assert known(SHAPE, {64: wins, 128: ties}).choose(SHAPE) == "dense"
    few = replace(SHAPE, tokens=4, training=False)
    both = {"dense": 1.0, "sorted": 0.9, "decode": 0.4}
    assert known(few, {4: both}).choose(few) == "decode"
    slow = {"dense": 1.0, "sorted": 3.0, "decode": 2.0}
    assert known(few, {4: slow}).choose(few) == "dense"
    assert known(few, {4: slow}).choose(few, dense_allowed=False) == "decode"


def test_a_shape_is_measured_once_and_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Shape] = []

    def fake(shape: Shape) -> dict[str, float]:
        asked.append(shape)
        return {"dense": 2.0, "sorted": 1.0}

    monkeypatch.setattr(stopwatch, "measure", fake)
    path = tmp_path / "folder" / "table.json"
    assert Table.load(path).choose(SHAPE) == "sorted"
    assert [shape.tokens for shape in asked] == [64, 128]
    assert Table.load(path).choose(SHAPE) == "sorted"  # another process
    assert len(asked) == 2
    document = json.loads(path.read_text())
    assert set(document["machine"]) == {"processor", "torch", "threads"}
    assert document["seconds"][replace(SHAPE, tokens=64).key] == {"dense": 2.0, "sorted": 1.0}
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_keep_each_others_figures(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first, second = Table.load(path), Table.load(path)
    first.seconds["a"] = {"dense": 1.0}
    first.save()
    second.seconds["b"] = {"dense": 2.0}
    second.save()
    assert set(Table.load(path).seconds) == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"seconds": 3}',
        '{"seconds": {"a": "fast"}}',
        '{"seconds": {"a": {"sorted": 1.0}}}',
        '{"seconds": {"a": {"dense": null}}}',
    ],
)
def test_a_damaged_file_counts_as_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    table = Table.load(path)
    assert table.seconds == {}
    table.seconds["a"] = {"dense": 1.0}
    table.save()
    assert Table.load(path).seconds == {"a": {"dense": 1.0}}


def test_binary_rubbish_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    assert Table.load(path).seconds == {}


def test_where_nothing_can_be_written_the_table_lives_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(stopwatch, "measure", lambda _shape: {"dense": 1.0, "sorted": 0.1})
    table = Table.load(tmp_path / "file" / "table.json")
    assert table.choose(SHAPE) == "sorted"
    assert table.path is None
    assert table.choose(SHAPE) == "sorted"


def test_the_file_is_this_machines_and_this_number_of_threads(tmp_path: Path) -> None:
    assert cache_path(str(tmp_path), 2) != cache_path(str(tmp_path), 3)
    assert cache_path(str(tmp_path), 2).parent == tmp_path / "switchable"
    assert "/" not in cache_path(None, 1).name


@pytest.mark.parametrize("training", [True, False])
def test_measuring_times_dense_and_every_candidate(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    shape = replace(SHAPE, tokens=4, training=training)
    state = torch.get_rng_state()
    with torch.no_grad():
        times = measure(shape)
    assert set(times) == {"dense", "masked" if training else "decode"}
    assert all(seconds > 0 for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), state)  # a run's random numbers do not depend on the table


@pytest.mark.parametrize(
    ("tokens", "training", "dtype", "experts", "way"),
    [
        (63, False, torch.float32, 8, "decode"),
        (16, False, torch.bfloat16, 8, "decode"),
        (17, False, torch.bfloat16, 8, "masked"),
        (63, True, torch.float32, 8, "masked"),
        (64, True, torch.float32, 8, "fused"),
        (64, False, torch.float32, 8, "fused"),
        (64, True, torch.bfloat16, 8, "masked"),
        (3763, True, torch.bfloat16, 8, "masked"),
        (3764, True, torch.bfloat16, 8, "sorted"),
        (64, True, torch.float32, 1, "sorted"),  # an expert of 512 neurons
    ],
)
def test_a_rule_and_not_a_stopwatch_chooses_the_sparse_way(
    tokens: int, training: bool, dtype: torch.dtype, experts: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An expert's product: tokens * 3/8 rows, 16 wide, d_ff / E = 248 / 8 = 31 neurons: 186 per token.
    d_ff, d_model = (248, 16) if experts == 8 else (512, 64)
    shape = Shape(tokens, d_model, d_ff, experts, min(3, experts), training=training, dtype=dtype)
    monkeypatch.setattr(stopwatch, "measure", lambda _shape: pytest.fail("measured"))
    assert Table(None).choose(shape, dense_allowed=False) == way


def test_auto_computes_the_experts_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "measure", lambda _shape: pytest.fail("measured"))
    found = problem(Case(tokens=4))
    torch.testing.assert_close(found.run("auto"), found.run("eager"))
    with torch.no_grad():
        torch.testing.assert_close(found.run("auto"), found.run("eager"))
