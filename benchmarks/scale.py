"""What several processes, switches and saves cost, on the demo's model (GPT-2, D=256, F=1,024, E=32, K=6).

    python -m benchmarks.scale [--quick]

    throughput_ddp, _fsdp    tokens per second of 2 one-thread processes (gloo) over those of 1 two-thread process
    switch_steps             measuring, clustering and regrouping all layers, in dense training steps
    save_blocks_steps        time for which a save holds up training, in dense training steps

Every figure is a ratio of medians of the same machine, minutes apart at most; that the processes compute the same is
tested in tests/train/test_ranks.py. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from switchable.config import from_dict
from switchable.ffn.convert import set_mode
from switchable.store import checkpoint
from switchable.store.contents import contents_of, training_state
from switchable.train.counters import Counters
from switchable.train.optim import clip_gradients
from switchable.train.parallel import process_group
from switchable.train.setup import Job, set_up


def make_corpus(folder: Path) -> None:
    """Random words, enough for a few hundred batches."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        words = torch.randint(0, 3000, (400,), generator=generator).tolist()
        (folder / f"{i}.txt").write_text(" ".join(f"w{w}" for w in words))


def make_job(folder: Path, parallel: str, threads: int) -> Job:
    """The demo's model, with twice its batch (4,096 tokens)."""
    given = {
        "data": {"data": [str(folder / "corpus")], "vocab_size": 2048},
        "model": {"d_model": 256, "num_layers": 4, "num_heads": 4},
        "train": {
            "steps": 1000,
            "parallel": "ddp" if parallel == "none" else parallel,
            "threads": threads,
            "batch_size": 16,
        },
        "switch": {"monitor_every": 1, "min_dense_fraction": 0.9},
    }
    return set_up(from_dict(given), folder / "cache", quiet=True)


def step(job: Job, index: int) -> None:
    """A training step without the controller."""
    job.replica.forward_backward(job.batch(index))
    clip_gradients(job.optimizer, job.config.train.grad_clip)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)


def rank(folder: Path, parallel: str, threads: int, rounds: int) -> None:
    """What one process does; the first prints its figures."""
    with process_group(120.0):
        job = make_job(folder, parallel, threads)
        job.model.train()
        seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
        for index in range(2 * rounds + 4):
            mode = "sparse" if index % 2 else "dense"
            set_mode(job.model, mode)
            begin = time.perf_counter()
            step(job, index)
            if index >= 4:
                seconds[mode].append(time.perf_counter() - begin)
        found = {mode: statistics.median(values) for mode, values in seconds.items()}
        if parallel == "none":
            set_mode(job.model, "dense")
            found |= {"switch": switch_seconds(job), "save": save_seconds(job, folder)}
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))


def switch_seconds(job: Job) -> float:
    """A measurement that gives every layer a new structure."""
    seconds = []
    for index in range(3):
        step(job, index)
        begin = time.perf_counter()
        measurement = job.controller.step(job.optimizer)
        seconds.append(time.perf_counter() - begin)
        assert measurement is not None
        assert all(measurement.regrouped)
    return statistics.median(seconds)


def save_seconds(job: Job, folder: Path) -> float:
    """From the beginning of a save until training goes on: the checkpoint stands then."""
    seconds = []
    for index in range(5):
        begin = time.perf_counter()
        counters = dataclasses.asdict(Counters())
        state = training_state(job.model, job.optimizer, job.controller.state_dict(), counters)
        checkpoint.write(folder / f"step-{index}", contents_of(job.model, state))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def launch(folder: Path, parallel: str, processes: int, threads: int, rounds: int) -> dict[str, float]:
    """Run `rank` in processes of its own; return the first one's figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--rank",
        str(folder),
        parallel,
        str(threads),
        str(rounds),
    ]
    running = []
    for r in range(processes):
        variables = {"OMP_NUM_THREADS": str(threads)}
        if processes > 1:
            variables |= {
                "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }  # fmt: skip
        running.append(
            subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in running]
    found: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return found


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds (about a minute)")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        folder, parallel, threads, rounds = args.rank
        rank(Path(folder), parallel, int(threads), int(rounds))
        return 0
    rounds = 6 if args.quick else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "corpus")
        alone = launch(folder, "none", 1, 2, rounds)
        ddp, fsdp = (launch(folder, parallel, 2, 1, rounds) for parallel in ("ddp", "fsdp"))
    figures = {
        "throughput_ddp": alone["dense"] / ddp["dense"],
        "throughput_ddp_sparse": alone["sparse"] / ddp["sparse"],
        "throughput_fsdp": alone["dense"] / fsdp["dense"],
        "throughput_fsdp_sparse": alone["sparse"] / fsdp["sparse"],
        "switch_steps": alone["switch"] / alone["dense"],
        "save_blocks_steps": alone["save"] / alone["dense"],
        "seconds_dense_step": alone["dense"],
    }
    for key, value in figures.items():
        print(f"{key:24} {value:8.3f}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
