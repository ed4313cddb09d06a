"""What is timed for a run's summary, and what its wall-clock is compared with, by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from test_loop import small

from switchable.ffn.convert import layers_of
from switchable.timing import Times
from switchable.train import timing
from switchable.train.counters import Counters
from switchable.train.parallel import process_group
from switchable.train.pretrain import pretrain
from switchable.train.setup import Job, set_up
from switchable.train.summary import plain_seconds
from switchable.train.timing import KINDS, step_seconds, warm_up

SEEN = (("dense", False, False), ("dense", True, False), ("dense", True, True), ("sparse", True, False))


@pytest.fixture
def watched(corpus: Path, tmp_path: Path) -> Callable[..., tuple[Job, list[Any]]]:
    """Set up a run both of whose layers take part; note how the first is multiplied in each training forward."""

    def make(**train: Any) -> tuple[Job, list[Any]]:
        job = set_up(small(corpus, train=train), tmp_path / "cache", quiet=True)
        seen: list[Any] = []
        for layer in layers_of(job.model):
            layer.ssd.takes_part = layer.ssd.multiplies_active = True

        def note(layer: Any, args: Any, _: Any) -> None:
            cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            seen.append(
                (layer.ssd.mode, layer.ssd.router_learns, layer.ssd.multiplies_active, cast, len(args[0]))
            )

        layers_of(job.model)[0].register_forward_hook(note)
        return job, seen

    return make


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_turns(contenders: Mapping[str, Callable[[], object]], *_: Any, **__: Any) -> Times:
        for call in contenders.values():
            call()
        return Times({name: [1.0] for name in contenders})

    monkeypatch.setattr(timing, "take_turns", take_turns)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_runs_own_step_is_timed(watched: Any, precision: str, parts: int) -> None:
    job, seen = watched(precision=precision, gradient_accumulation_steps=parts)
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    assert set(step_seconds(job)) == set(KINDS)
    kinds = [(*kind, getattr(torch, precision), 4 // parts) for kind in SEEN]
    assert seen == [kind for kind in kinds for _ in range(parts)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.model.state_dict().items())
    assert all(p.grad is None for p in job.model.parameters())
    ssd = layers_of(job.model)[0].ssd
    assert (ssd.mode, ssd.router_learns, ssd.multiplies_active) == ("dense", True, True)


@pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn of their own insides
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_are_timed_compiled(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = watched(compile=True)
    compiled = []
    block: Any = job.model.transformer.h[0]  # type: ignore[union-attr]
    original = block._compiled_call_impl
    monkeypatch.setattr(
        block, "_compiled_call_impl", lambda *args, **more: (compiled.append(1), original(*args, **more))[1]
    )
    step_seconds(job)
    assert len(compiled) == len(KINDS)


def test_warming_up_makes_every_kind_of_step_and_changes_nothing(watched: Any) -> None:
    job, seen = watched()
    for layer in layers_of(job.model):
        layer.ssd.takes_part = layer.ssd.multiplies_active = False  # as at the beginning of a run
    state, random = job.model.state_dict(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    warm_up(job)
    assert [kind[:3] for kind in seen] == [
        ("dense", True, False),
        ("dense", True, True),
        ("sparse", True, False),
        ("sparse", True, False),  # experts chosen by the router, and by 8 bits
    ]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert not job.optimizer.state
    assert all(p.grad is None for p in job.model.parameters())
    assert [layer.ssd.active_count.tokens for layer in layers_of(job.model)] == [0, 0]
    assert [(layer.ssd.mode, layer.ssd.multiplies_active) for layer in layers_of(job.model)] == [
        ("dense", False)
    ] * 2


def time_on_two_ranks(out: Path, corpus: Path) -> None:
    with process_group(60):
        job = set_up(small(corpus, train={"parallel": "ddp"}), out / "cache", quiet=True)
        for layer in layers_of(job.model):
            layer.ssd.takes_part = True
        seconds = step_seconds(job, rounds=2)
        (out / f"seconds-{torch.distributed.get_rank()}").write_text(json.dumps(seconds))


def test_ranks_are_timed_together_though_routers_of_a_plain_step_do_not_learn(
    corpus: Path, tmp_path: Path
) -> None:
    ended = run_ranks(2, time_on_two_ranks, tmp_path, corpus, log=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    assert set(json.loads((tmp_path / "seconds-1").read_text())) == set(KINDS)


def test_plain_seconds_by_hand() -> None:
    seconds = {"dense": 2.0, "dense_router": 2.2, "active": 1.0, "sparse": 1.6}
    timed = {"active": 60.0, "sparse": 70.0}
    counters = Counters(steps=10, sparse_steps=4, seconds_dense=16.0, seconds_sparse=8.0)
    # Dense steps saved half of what the timed one does: 1.6 s where a plain one takes 2; sparse ones all of it.
    counters.flops_dense, counters.flops_sparse = 6 * 80.0, 4 * 70.0
    assert plain_seconds(counters, seconds, 100.0, timed) == pytest.approx(16 * 2 / 1.6 + 8 * 2 / 1.6)
    # Whatever the machine was busy with, the ratio is the same, and never better than the best kind of step.
    slow = Counters(steps=10, sparse_steps=4, seconds_dense=160.0, seconds_sparse=80.0)
    slow.flops_dense, slow.flops_sparse = counters.flops_dense, counters.flops_sparse
    ratios = [c.train_seconds / plain_seconds(c, seconds, 100.0, timed) for c in (counters, slow)]
    assert ratios == pytest.approx([0.8, 0.8])


def test_an_all_dense_run_takes_as_long_as_plain_dense_steps() -> None:
    seconds = {"dense": 2.0, "dense_router": 2.0, "active": 2.0, "sparse": 2.0}
    counters = Counters(steps=5, flops_dense=500.0, seconds_dense=10.0, seconds_measure=1.0)
    plain = plain_seconds(counters, seconds, 100.0, {"active": 100.0, "sparse": 100.0})
    assert counters.train_seconds / plain == pytest.approx(1.1)


@pytest.mark.parametrize("more", [{}, {"precision": "bfloat16", "gradient_accumulation_steps": 2}], ids=str)
def test_the_wall_ratio_of_an_all_dense_run_is_one_and_what_measuring_took(
    corpus: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """Its steps are the plain ones, which the clock above finds equally fast."""
    for every in (0, 5):
        config = small(
            corpus, train=more, switch={"recipe": "dense", "min_dense_fraction": 1.0, "monitor_every": every}
        )
        found = pretrain(config, tmp_path / f"run-{every}", tmp_path / "cache", quiet=True)
        assert (found["step_speedup_sparse"], found["step_speedup_active"], found["router_overhead"]) == (
            None,
            1.0,
            0.0,
        )
        assert found["wall_ratio"] == pytest.approx(found["wall_seconds_train"] / found["wall_seconds_dense"])
        assert (found["wall_seconds_measure"] == 0) == (every == 0)
