"""What the training loop adds to the model's own work, and what sparse mode does to time and memory.

    python -m benchmarks.loop [--quick]

Three questions, on the demo's model (GPT-2, D=256, F=1,024, E=32, K=6):

    loop_overhead       our loop's step / (forward + backward + clipping + optimizer step) - 1, both dense
    step_speedup        plain dense step / sparse step, all layers sparse, timed in turns
    peak_memory_ratio   peak memory of sparse steps / of dense steps, above what the process held before the first
                        step; each mode in a process of its own

Before anything is timed, sparse mode with all experts on must equal dense mode. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from switchable.config import from_dict
from switchable.ffn.convert import kept_modes, layers_of, set_mode
from switchable.store.rundir import RunDir
from switchable.timing import take_turns
from switchable.train.counters import Counters
from switchable.train.flops import count
from switchable.train.log import RunLog
from switchable.train.loop import Trainer
from switchable.train.optim import clip_gradients
from switchable.train.setup import Job, set_up
from switchable.train.signals import StopRequest
from switchable.train.timing import step_seconds


def make_job(folder: Path) -> Job:
    """The demo's model on a small random corpus; no measuring falls into the timed steps."""
    corpus = folder / "corpus"
    corpus.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        words = torch.randint(0, 3000, (400,), generator=generator).tolist()
        (corpus / f"{i}.txt").write_text(" ".join(f"w{w}" for w in words))
    given = {
        "data": {"data": [str(corpus)], "vocab_size": 2048},
        "model": {"d_model": 256, "num_layers": 4, "num_heads": 4},
        "train": {"steps": 100_000, "log_every": 10},
        "switch": {"monitor_every": 100_000},
    }
    return set_up(from_dict(given), folder / "cache", quiet=True)


def check_parity(job: Job) -> bool:
    """Whether all experts on equals dense, to a relative 1e-5."""
    batch = {"input_ids": job.batch(0)["input_ids"]}
    with kept_modes(job.model), torch.no_grad():
        dense = job.model(**batch).logits
        set_mode(job.model, "sparse", layers_of(job.model)[0].ssd.num_experts)
        sparse = job.model(**batch).logits
    return bool((sparse - dense).norm() <= 1e-5 * dense.norm())


def loop_overhead(job: Job, folder: Path, rounds: int) -> float:
    """Our step against the bare one, in turns, both dense."""
    log = RunLog(RunDir(folder), job.config.train.steps, quiet=True)
    flops = count(job.model, job.batch(0))
    trainer = Trainer(job, RunDir(folder), log, flops, Counters(), StopRequest())

    def ours() -> None:
        trainer._step()
        if trainer.counters.steps % job.config.train.log_every == 0:
            trainer._log_train()

    def bare() -> None:
        job.model(**batch).loss.backward()
        clip_gradients(job.optimizer, job.config.train.grad_clip)
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)

    batch = job.batch(0)
    seconds = take_turns({"bare": bare, "ours": ours}, 0.0, turns=rounds).medians
    log.close()
    return seconds["ours"] / seconds["bare"] - 1.0


def peak_bytes(mode: str) -> int:
    """Peak memory of three steps in one mode above what there was before them, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loop", "--peak", mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def print_peak(mode: str) -> None:
    """Print this process's growth over three steps in `mode`, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder))
    batch = {k: v.repeat(4, 1) if isinstance(v, torch.Tensor) else v for k, v in job.batch(0).items()}
    set_mode(job.model, mode)
    for layer in layers_of(job.model):
        layer.ssd.router_learns = False  # a plain dense step: what all-dense training needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        job.model(**batch).loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds (under a minute)")
    parser.add_argument("--peak", choices=("dense", "sparse"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak)
        return 0
    rounds = 10 if args.quick else 40
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder)
        if not check_parity(job):
            print(
                "sparse mode with all experts on differs from dense mode: nothing is reported",
                file=sys.stderr,
            )
            return 1
        for layer in layers_of(job.model):
            layer.ssd.takes_part = True
        seconds = step_seconds(job, rounds)
        for layer in layers_of(job.model):
            layer.ssd.router_learns = False
        figures = {"loop_overhead": loop_overhead(job, folder, rounds)}
    figures["step_speedup"] = seconds["dense"] / seconds["sparse"]
    figures["router_overhead"] = seconds["dense_router"] / seconds["dense"] - 1.0
    figures["peak_memory_ratio"] = peak_bytes("sparse") / peak_bytes("dense")
    for name, value in figures.items():
        print(f"{name:20} {value:8.3f}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
