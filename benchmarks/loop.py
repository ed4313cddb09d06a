"""What the training loop adds to the model's own work, and what sparse mode does to time and memory.

    python -m benchmarks.loop [--quick] [--precision bfloat16]

Three questions, on the demo's model (GPT-2, D=256, F=1,024, E=32, K=6), in either precision:

    loop_overhead       our loop's step / (forward + backward + clipping + optimizer step) - 1, both dense
    step_speedup        plain dense step / sparse step, all layers sparse, timed in turns
    peak_memory_ratio   peak memory of sparse steps / of dense steps, above what the process held before the first
                        step; each mode in a process of its own

And one on GPT-2 with D=512, 8 layers, steps of 16 sequences of 256 tokens, all dense:

    over_plain_loop     tokens per second of `pretrain` / of a plain loop over the same transformers model, with torch's
                        autocast, AdamW and clipping; each in a process of its own, which take turns

Before anything is timed, sparse mode with all experts on must equal dense mode. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from switchable.config import from_dict
from switchable.ffn.builders import build_model
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

DENSE: dict[str, dict[str, Any]] = {
    "model": {"d_model": 512, "num_layers": 8, "num_heads": 8},
    "train": {"batch_size": 16, "sequence_length": 256},
    "switch": {"recipe": "dense"},
}
"""What a plain loop is compared with."""


def make_job(folder: Path, precision: str, changes: Mapping[str, dict[str, Any]] | None = None) -> Job:
    """The demo's model, or another, on a small random corpus; no measuring falls into the timed steps."""
    corpus = folder / "corpus"
    corpus.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        words = torch.randint(0, 3000, (400,), generator=generator).tolist()
        (corpus / f"{i}.txt").write_text(" ".join(f"w{w}" for w in words))
    given = {
        "data": {"data": [str(corpus)], "vocab_size": 2048},
        "model": {"d_model": 256, "num_layers": 4, "num_heads": 4},
        "train": {"steps": 100_000, "log_every": 10, "precision": precision},
        "switch": {"num_experts": 32, "experts_per_token": 6, "monitor_every": 100_000},
    }
    given = {name: values | (changes or {}).get(name, {}) for name, values in given.items()}
    job = set_up(from_dict(given), folder / "cache", quiet=True)
    for layer in layers_of(job.model):
        layer.ssd.takes_part = True  # no measurement that would let it is due
    return job


def check_parity(job: Job) -> bool:
    """Whether all experts on equals dense, to a relative 1e-5, in bfloat16 3e-2."""
    batch = {"input_ids": job.batch(0)["input_ids"]}
    with kept_modes(job.model), torch.no_grad(), job.replica.autocast():
        dense = job.model(**batch).logits
        set_mode(job.model, "sparse", layers_of(job.model)[0].ssd.num_experts)
        sparse = job.model(**batch).logits
    allowed = 1e-5 if job.config.train.precision == "float32" else 3e-2
    return bool((sparse - dense).norm() <= allowed * dense.norm())


@contextmanager
def our_step(job: Job, folder: Path) -> Iterator[Callable[[], None]]:
    """One step of the training loop, with what it logs."""
    log = RunLog(RunDir(folder), job.config.train.steps, quiet=True)
    flops = count(job.model, job.batch(0))
    trainer = Trainer(job, RunDir(folder), log, flops, Counters(), StopRequest())

    def step() -> None:
        trainer._step()
        if trainer.counters.steps % job.config.train.log_every == 0:
            trainer._log_train()

    yield step
    log.close()


def loop_overhead(job: Job, folder: Path, rounds: int) -> float:
    """Our step against the bare one, in turns, both dense."""

    def bare() -> None:
        with job.replica.autocast():
            loss = job.model(**batch).loss
        loss.backward()
        clip_gradients(job.optimizer, job.config.train.grad_clip)
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)

    batch = job.batch(0)
    with our_step(job, folder) as ours:
        seconds = take_turns({"bare": bare, "ours": ours}, 0.0, turns=rounds).medians
    return seconds["ours"] / seconds["bare"] - 1.0


@contextmanager
def plain_step(precision: str) -> Iterator[Callable[[], None]]:
    """One step of a loop over a transformers model as its documentation has it: nothing of ours, all of it default."""
    sizes = {"d_model": 512, "d_ff": 2048, "num_layers": 8, "num_heads": 8, "max_positions": 256}
    model = build_model("gpt2", sizes, "relu2", 2048, {"eos_token_id": 0}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids_BS = torch.randint(0, 2048, (16, 256), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield step


def answer_steps(which: str, precision: str) -> None:
    """Make one step for each line that comes in, and answer with a line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = which == "ours"
        with our_step(make_job(folder, precision, DENSE), folder) if ours else plain_step(precision) as step:
            for _ in sys.stdin:
                step()
                print("done", flush=True)


def over_plain_loop(precision: str, rounds: int) -> float:
    """Tokens per second of our loop over those of a plain one; a step has as many tokens in both."""

    def started(which: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.loop", "--steps-of", which, "--precision", precision]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def step(process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        process.stdin.write("step\n")
        if not process.stdout.readline():
            raise SystemExit(f"a process that was timed ended with code {process.wait()}")

    with started("ours") as ours, started("plain") as plain:
        calls = {"ours": lambda: step(ours), "plain": lambda: step(plain)}
        return take_turns(calls, 0.0, turns=rounds).ratio("plain", "ours")


def peak_bytes(mode: str, precision: str) -> int:
    """Peak memory of three steps in one mode above what there was before them, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loop", "--peak", mode, "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def print_peak(mode: str, precision: str) -> None:
    """Print this process's growth over three steps in `mode`, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), precision)
    batch = {k: v.repeat(4, 1) if isinstance(v, torch.Tensor) else v for k, v in job.batch(0).items()}
    set_mode(job.model, mode)
    for layer in layers_of(job.model):
        layer.ssd.router_learns = False  # a plain dense step: what all-dense training needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        job.replica.forward_backward(batch)
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
    parser.add_argument("--steps-of", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.precision)
        return 0
    if args.steps_of:
        answer_steps(args.steps_of, args.precision)
        return 0
    rounds = 10 if args.quick else 40
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder, args.precision)
        if not check_parity(job):
            print(
                "sparse mode with all experts on differs from dense mode: nothing is reported",
                file=sys.stderr,
            )
            return 1
        seconds = step_seconds(job, rounds)
        for layer in layers_of(job.model):
            layer.ssd.router_learns = False
        figures = {"loop_overhead": loop_overhead(job, folder, rounds)}
    figures["step_speedup"] = seconds["dense"] / seconds["sparse"]
    figures["router_overhead"] = seconds["dense_router"] / seconds["dense"] - 1.0
    sparse, dense = (peak_bytes(mode, args.precision) for mode in ("sparse", "dense"))
    figures["peak_memory_ratio"] = sparse / dense
    figures["over_plain_loop"] = over_plain_loop(args.precision, rounds=5 if args.quick else 15)
    for name, value in figures.items():
        print(f"{name:20} {value:8.3f}")
    print(json.dumps({"benchmark": "loop", "precision": args.precision, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
