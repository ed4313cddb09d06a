"""The calculator against what small runs really hold, send and write."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from train.test_loop import small

from switchable.cli import main
from switchable.cli.plan import _shown
from switchable.config import RunConfig, from_dict
from switchable.ffn.convert import set_mode
from switchable.store import checkpoint
from switchable.store.contents import contents_of, training_state
from switchable.switching.schedule import Schedule
from switchable.timing import processor
from switchable.train.flops import StepFlops
from switchable.train.parallel import process_group
from switchable.train.plan import _measured, _schedule, plan
from switchable.train.pretrain import pretrain
from switchable.train.setup import set_up


class Traffic(TorchDispatchMode):
    """Adds up the bytes that collectives gather or reduce, as one rank sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.scattered += args[1].nbytes
        elif func is torch.ops.c10d.allreduce_.default and args[0][0].is_floating_point():
            self.reduced += args[0][0].nbytes
        return func(*args, **(kwargs or {}))


def weigh(config: RunConfig, folder: Path) -> None:
    """One step on two ranks: what this rank holds afterwards, what it sent, what a checkpoint takes."""
    with process_group(60):
        job = set_up(config, folder / "cache", quiet=True)
        set_mode(job.model, "dense")
        with Traffic() as traffic:
            job.replica.forward_backward(job.batch(0))
        gradients = sum(_local(p.grad).nbytes for p in job.model.parameters() if p.grad is not None)
        job.optimizer.step()
        held = gradients
        for parameter in job.model.parameters():
            held += _local(parameter).nbytes
            held += sum(_local(t).nbytes for t in job.optimizer.state[parameter].values() if t.ndim)
        state = training_state(job.model, job.optimizer, job.controller.state_dict(), {})
        checkpoint.write(folder / "saved", contents_of(job.model, state))
        if dist.get_rank() == 0:
            found = {
                "parameters": sum(p.numel() for p in job.model.parameters()), "held": held,
                "gathered": traffic.gathered, "scattered": traffic.scattered, "reduced": traffic.reduced,
                "vocab": job.data.vocab_size,
            }  # fmt: skip
            (folder / "found.json").write_text(json.dumps(found))


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("parallel", "parts"),
    [("ddp", 1), ("fsdp", 1), ("fsdp", 2)],
    ids=["ddp", "fsdp", "fsdp in micro-batches"],
)
def test_two_ranks_hold_send_and_write_what_was_planned(
    corpus: Path, tmp_path: Path, parallel: str, parts: int
) -> None:
    config = small(
        corpus,
        model={"d_model": 32, "d_ff": 128},
        train={"parallel": parallel, "gradient_accumulation_steps": parts},
    )
    ended = run_ranks(2, weigh, config, tmp_path, log=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    found = json.loads((tmp_path / "found.json").read_text())
    planned = plan(config, found["vocab"], 2, 0.1)
    assert planned.parameters + planned.router_parameters == found["parameters"]
    # Shards of odd sizes are rounded up to whole rows.
    assert found["held"] == pytest.approx(planned.state_bytes, rel=0.02)
    if parallel == "ddp":
        # All-reduce sends twice what each rank does not hold the sum of; 8 bytes more count the predicted tokens.
        assert found["reduced"] == planned.traffic_bytes + 8
    else:
        # Each rank receives the half it does not hold, whenever something is gathered or summed.
        assert (found["gathered"] + found["scattered"]) / 2 == pytest.approx(planned.traffic_bytes, rel=0.02)
    written = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*tensors"))
    assert written == pytest.approx(planned.checkpoint_bytes, rel=0.05, abs=30_000)  # and JSON


def test_a_plan_by_hand() -> None:
    config = from_dict(
        {
            "model": {"d_model": 8, "num_layers": 3, "num_heads": 2},
            "train": {"batch_size": 4, "sequence_length": 16, "parallel": "fsdp"},
            "switch": {
                "num_experts": 4,
                "experts_per_token": 1,
                "min_dense_fraction": 0.2,
                "sparse_steps": 3,
            },
        }
    )
    found = plan(config, 50, 2, 0.1)
    D, F, V, S, E = 8, 32, 50, 16, 4
    block = 12 * D * D + 13 * D
    assert found.parameters == V * D + S * D + 3 * block + 2 * D
    assert found.router_parameters == 3 * (D * E + E)
    assert found.checkpoint_bytes == 12 * (found.parameters + found.router_parameters)
    assert found.state_bytes == 16 * (found.parameters + found.router_parameters) // 2
    # The largest unit is an FFN with its router (or the embeddings): weights of two at a time.
    ffn = 2 * D * F + F + D + D * E + E
    assert found.gathered_bytes == 8 * max(ffn, V * D + S * D + 2 * D)
    assert found.regroup_bytes == 12 * 3 * (2 * D * F + F) / 2
    tokens = 4 * S
    saved = 2 * tokens * (12 * D * F * 3 / 4 - D * F)  # the products in 8 bits count half
    assert found.step_flops_dense - found.step_flops_sparse == pytest.approx(saved, rel=0.1)
    # From step 100 on, up to the last twentieth, 3 of 4 steps. Measurements cost something too.
    assert found.sparse_fraction == pytest.approx((1 - 0.2 - 0.05) * 3 / 4, abs=1 / 500)
    assert found.step_flops_sparse / found.step_flops_dense < found.flops_ratio
    alone = plan(config, 50, 1, 0.1)
    assert (alone.traffic_bytes, alone.gathered_bytes, alone.regroup_bytes) == (0, 0, 0)


@pytest.mark.parametrize("active_below", [0.0, 1.0], ids=["every neuron", "active neurons"])
def test_the_flops_ratio_is_the_one_that_a_run_measures(
    corpus: Path, tmp_path: Path, active_below: float
) -> None:
    config = small(corpus, train={"batch_size": 32}, switch={"active_below": active_below})
    figures = pretrain(config, tmp_path / "run", tmp_path / "cache", quiet=True)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    found = [
        layer["activation_ratio"] for line in lines if line["kind"] == "measure" for layer in line["layers"]
    ]
    planned = plan(config, 300, 1, sum(found) / len(found))
    assert planned.sparse_fraction == figures["sparse_fraction"] == 9 / 20
    # What fires in training is not quite what fires on the probe.
    assert planned.flops_ratio == pytest.approx(figures["flops_ratio"], rel=0.01 if active_below else 1e-6)


def test_this_machine_is_planned_unless_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--d-model",
        "64",
        "--num-layers",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--precision",
        "float32",
    ]
    assert main(["plan", *sizes, "--steps", "9"]) == 0
    shown = capsys.readouterr().out.splitlines()
    figures = json.loads(shown[-1])
    assert shown[0] == f"1 x {processor()}, 1 threads, float32"
    assert figures["device"] == f"{processor()}, 1 threads"
    assert figures["seconds_of_run"] == pytest.approx(figures["seconds_all_dense"] * figures["flops_ratio"])
    assert main(["plan", *sizes, "--world-size", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1])["seconds_of_traffic"] is None
    assert any(line.split() == ["seconds_of_traffic", "give", "--link"] for line in shown)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.002, "2.000 ms"),
        (1.5, "1.500 s"),
        (90, "1.500 minutes"),
        (5400, "1.500 hours"),
        (172800, "2.000 days"),
    ],
)
def test_durations_are_shown_in_units_that_fit(seconds: float, shown: str) -> None:
    assert _shown("seconds_of_run", seconds).strip() == shown


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--d-model", "64", "--num-layers", "2", "--batch-size", "8", "--sequence-length", "32"]
    for precision, peak in (("bfloat16", 312e12), ("float32", 19.5e12)):
        assert main(["plan", "--world-size", "4", "--gpu", "a100", "--precision", precision, *sizes]) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        expected = figures["step_flops_dense"] / (4 * peak * 0.4)
        assert figures["seconds_per_dense_step"] == pytest.approx(expected)
    assert figures["seconds_of_traffic"] == pytest.approx(figures["traffic_bytes"] / 300e9)
    for wrong, word in (
        (["--gpu", "h1000"], "did you mean 'h100'"),
        (["--world-size", "0"], "world_size=0"),
        (["--world-size", "3"], "does not divide among 3"),
        (["--utilization", "40"], "utilization=40"),
        (["--link", "0"], "link=0"),
        (["--activation-ratio", "2"], "activation_ratio=2"),
    ):
        assert main(["plan", *sizes, *wrong]) == 2
        assert word in capsys.readouterr().err


def step_by_step(config: RunConfig, flops: StepFlops, layers: int, ratio: float) -> tuple[float, int]:
    """What `_schedule` finds, by asking the schedule at every step, as a run does."""
    switch, train = config.switch, config.train
    schedule, batch = Schedule(switch, train.steps), train.batch_size * train.sequence_length
    few, every = switch.experts_per_token, switch.num_experts
    measures = [_measured(ratio, 0.0, every, every), *[_measured(ratio, 1.0, few, every)] * (layers - 1)]
    state, spent, sparse_steps = schedule.initial(layers), 0.0, 0
    for step in range(train.steps):
        mode = schedule.mode_at(step, state)
        parts = zip(state.takes_part, state.experts_per_token, strict=True)
        experts = [k if part and mode == "sparse" else None for part, k in parts]
        spent += flops.step(experts, estimates=state.estimates)
        sparse_steps += mode == "sparse"
        if schedule.is_measured(step + 1, state):
            spent += flops.measurement(-(-train.probe_tokens // batch) * batch)
            state = schedule.decide(step + 1, state, measures).state
    return spent, sparse_steps


@pytest.mark.parametrize("growth", [1.0, 1.1, 1.3, 2.5])
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.05), (0.3, 0.0), (0.3, 0.25), (0.7, 0.5), (1.0, 0.0)])
def test_what_changes_in_a_schedule_is_what_its_steps_add_up_to(
    growth: float, first: float, last: float
) -> None:
    flops = StepFlops(
        1024, 100.0, 9.0, (20.0,) * 3, (3.0,) * 3, (1.5,) * 3, (0.7,) * 3, (1.1,) * 3, (8.0,) * 3
    )
    for steps, every, sparse_steps in ((1, 1, 1), (7, 3, 2), (100, 10, 3), (977, 7, 4), (2000, 50, 1)):
        switch = {
            "num_experts": 8, "experts_per_token": 3, "monitor_every": every, "monitor_growth": growth,
            "sparse_steps": sparse_steps, "min_dense_fraction": first, "final_dense_fraction": last,
        }  # fmt: skip
        config = from_dict({"train": {"steps": steps, "batch_size": 4}, "switch": switch})
        spent, sparse = _schedule(config, flops, 3, 0.1, 64)
        expected, expected_sparse = step_by_step(config, flops, 3, 0.1)
        assert sparse == expected_sparse, (steps, every)
        assert spent == pytest.approx(expected, rel=1e-12)


def test_the_longest_run_is_planned_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--d-model", "16", "--num-heads", "2", "--gpu", "h100", "--recipe", "early"]
    begin = time.monotonic()
    assert main([*flags, "--steps", str(2**31 - 1), "--set", "monitor_every=1"]) == 0
    assert time.monotonic() - begin < 10
    long = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*flags, "--steps", "20000", "--set", "monitor_every=1"]) == 0
    short = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert long["flops_ratio"] == pytest.approx(short["flops_ratio"], rel=1e-3)
