"""Starts the processes that `experiments.faults` hits, and checks what they leave."""

from __future__ import annotations

import multiprocessing as mp
import random
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.fault_worker import PHASES, Attempt, run
from switchable.config import RunConfig, from_dict
from switchable.store.rundir import RunDir

SECONDS = 120.0
"""A process that takes longer hangs."""
INTERVAL = 4
"""Steps between checkpoints."""
WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "dog", "run", "over", "hill", "fish",
]  # fmt: skip


def configuration(corpus: Path, steps: int) -> RunConfig:
    """A model so small that starting it takes longer than training it, switching every few steps."""
    return from_dict(
        {
            "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
            "data": {"data": [str(corpus)], "vocab_size": 300},
            "train": {
                "steps": steps, "batch_size": 4, "sequence_length": 16, "log_every": 5, "eval_every": 0,
                "eval_tokens": 256, "checkpoint_every": INTERVAL, "keep": 2,
            },
            "switch": {
                "recipe": "early", "num_experts": 8, "experts_per_token": 3, "monitor_every": 6,
                "stability_threshold": 0.0, "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2,
                "min_dense_fraction": 0.05, "final_dense_fraction": 0.1,
            },
        }
    )  # fmt: skip


class Harness:
    """Starts processes, hits them, and checks what they leave.

    Args:
        folder: an empty folder to work in.
        seed: of all that is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["experiments.fault_worker"])
        self.durations = self.context.Array("d", [0.05] * len(PHASES))
        self.progress = self.context.Value("i", 0)
        self.corpus = folder / "corpus"
        self.corpus.mkdir()
        generator = random.Random(0)
        for i in range(60):
            text = " ".join(generator.choice(WORDS) for _ in range(300))
            (self.corpus / f"{i:03d}.txt").write_text(text)
        self.failures: list[str] = []

    def attempt(self, name: str, steps: int) -> Attempt:
        """An attempt at the run `name`."""
        out, cache = self.folder / name, self.folder / "cache"
        config = configuration(self.corpus, steps)
        return Attempt(config, str(out), str(cache), self.durations, self.progress)

    def start(self, attempt: Attempt, world_size: int = 1, rank_timeout: float = 60.0) -> list[Any]:
        """Start the process, or one per rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        traps = [None] * (world_size - 1) + [attempt.trap]  # the last rank is the one that is hit
        processes = [
            self.context.Process(
                target=run, args=(replace(attempt, trap=trap), rank, world_size, port, rank_timeout)
            )
            for rank, trap in enumerate(traps)
        ]
        for process in processes:
            process.start()
        return processes

    def finish(self, attempt: Attempt, world_size: int = 1) -> list[int]:
        """Run to the end; return the exit codes. One that hangs is killed and counts as a failure."""
        return [self.join(process) for process in self.start(attempt, world_size)]

    def join(self, process: Any, seconds: float = SECONDS) -> int:
        """Wait for a process to end and return its exit code."""
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            self.failures.append(f"a process hung for {seconds:g} s")
        return int(process.exitcode)

    def same(self, name: str, other: str) -> bool:
        """Whether two finished runs have bitwise the same weights, moments and structures, and left nothing behind."""
        a, b = (RunDir(self.folder / each) for each in (name, other))
        steps = a.steps()
        if not steps or steps != b.steps()[-len(steps) :]:
            return self.expect(False, f"{name} ended with checkpoints {steps}, {other} with {b.steps()}")
        equal = True
        for file in ("model.safetensors", "switchable.tensors", "training.tensors"):
            ours, theirs = (load_file(r.checkpoint(steps[-1]) / file) for r in (a, b))
            equal &= ours.keys() == theirs.keys()
            equal = equal and all(torch.equal(ours[k], theirs[k]) for k in ours)
        final = [load_file(r.final / "model.safetensors") for r in (a, b)]
        equal = equal and all(torch.equal(final[0][k], final[1][k]) for k in final[0])
        left = [str(path) for path in a.path.rglob(".tmp-*")]
        self.expect(not left, f"{name} left {left}")
        a.acquire()  # raises if the lock is not free
        a.release()
        return self.expect(equal, f"{name} is not bitwise {other}")

    def expect(self, fact: bool, otherwise: str) -> bool:
        """Note a failure unless `fact`."""
        if not fact:
            self.failures.append(otherwise)
            print(f"FAILED: {otherwise}", file=sys.stderr, flush=True)
        return fact

    def stderr(self, attempt: Attempt, rank: int = 0) -> str:
        """What the last process of a rank said."""
        out = Path(attempt.out)
        return out.with_name(f"{out.name}.stderr-{rank}").read_text()
