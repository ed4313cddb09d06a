"""Everything that can happen to a run, made to happen: after each fault it must go on as if nothing had been.

    python -m experiments.faults [--quick] [--kills 500] [--seed 0]

    kill -9          at random moments of a step, a switch, a save and a resume, over and over
    SIGTERM          the run saves first
    disk full        in the middle of a checkpoint
    damage           a checkpoint truncated, with a flipped bit, half deleted
    clock            the wall clock jumps by up to a day, to and fro
    lost rank        one of two ranks is killed
    stalled rank     one of two ranks stops answering

After each fault: the run resumes by the command that the message names; what was saved before the fault stands; the
final weights, moments and structures are bitwise those of an undisturbed run of the same number of processes; no
temporary file is left and the folder's lock is free. A killed run loses the steps since the last checkpoint: at
most those of one save interval, since training waits until a checkpoint stands.

Processes are forked from a server that has loaded torch once, so a hundred lives take minutes. The last line is one
JSON document; the exit code is 0 only if every fault was survived.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.fault_worker import PHASES, Attempt, Trap, run
from switchable.config import RunConfig, from_dict
from switchable.store.rundir import RunDir

SECONDS = 120.0
"""A process that takes longer hangs."""
INTERVAL = 4
"""Steps between checkpoints."""
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "red",
    "dog",
    "run",
    "over",
    "hill",
    "fish",
]


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


def kills(harness: Harness, wanted: int, steps: int) -> dict[str, Any]:
    """Kill a run `wanted` times, wherever it is; start another whenever one gets to its end."""
    done = survived = runs = lost_most = 0
    by_phase = dict.fromkeys([*PHASES, "start"], 0)
    bitwise = True
    attempt = harness.attempt("killed-0", steps)
    while True:
        harness.progress.value = 0
        before = _newest(attempt)
        phase = harness.random.choice(list(by_phase))
        if done < wanted and phase != "start":
            # A resume happens once per life, a switch every six steps.
            most = {"resume": 1, "switch": 2, "save": 3}.get(phase, 3 * INTERVAL)
            trap = Trap(phase, harness.random.randint(1, most), harness.random.random())
            code = harness.finish(replace(attempt, trap=trap))[0]
        elif done < wanted:
            process = harness.start(attempt)[0]
            time.sleep(harness.random.uniform(0, 0.6))
            process.kill()
            code = harness.join(process)
        else:
            code = harness.finish(attempt)[0]
        after = _newest(attempt)
        if code == -signal.SIGKILL:
            done += 1
            by_phase[phase] += 1
            lost = harness.progress.value - after
            lost_most = max(lost_most, lost)
            ok = after >= before and lost <= INTERVAL
            survived += harness.expect(
                ok, f"killed in {phase}: checkpoint {before} -> {after}, {lost} steps lost"
            )
            _say(done, wanted, after, steps)
            continue
        if not harness.expect(
            code == 0, f"exit code {code} after {done} kills: {harness.stderr(attempt)[-500:]}"
        ):
            return {"kills": done, "survived": survived - 1, "bitwise_equal": False}
        bitwise &= harness.same(Path(attempt.out).name, "undisturbed")
        runs += 1
        if done >= wanted:
            break
        attempt = harness.attempt(f"killed-{runs}", steps)
    return {
        "kills": done, "survived": survived, "bitwise_equal": bitwise, "runs": runs, "killed_in": by_phase,
        "steps_lost_at_most": lost_most, "save_interval": INTERVAL,
    }  # fmt: skip


def _newest(attempt: Attempt) -> int:
    return max(RunDir(Path(attempt.out)).steps(), default=0)


def _say(done: int, wanted: int, after: int, steps: int) -> None:
    if done % 10 == 0:
        print(f"{done}/{wanted} kills, checkpoint at step {after}/{steps}", file=sys.stderr, flush=True)


def sigterm(harness: Harness, steps: int) -> bool:
    """The run saves, says how to go on, and goes on."""
    attempt = harness.attempt("sigterm", steps)
    trap = Trap("step", harness.random.randint(5, steps - 5), 0.5, signal.SIGTERM)
    code = harness.finish(replace(attempt, trap=trap))[0]
    harness.expect(code == 128 + signal.SIGTERM, f"SIGTERM ended in exit code {code}")
    harness.expect("--resume" in harness.stderr(attempt), "SIGTERM: no word about how to go on")
    harness.expect(_newest(attempt) == harness.progress.value, "SIGTERM: the last step was not saved")
    return harness.finish(attempt) == [0] and harness.same("sigterm", "undisturbed")


def disk_full(harness: Harness, steps: int) -> bool:
    """The checkpoint is dropped, the older ones stand, and with more room the run goes on."""
    attempt = harness.attempt("disk-full", steps)
    code = harness.finish(replace(attempt, full_disk_after=harness.random.randint(250_000, 1_000_000)))[0]
    harness.expect(code == 2, f"a full disk ended in exit code {code}")
    harness.expect("no space left" in harness.stderr(attempt), f"a full disk: {harness.stderr(attempt)}")
    return harness.finish(attempt) == [0] and harness.same("disk-full", "undisturbed")


def damage(harness: Harness, steps: int, how: str) -> bool:
    """The damaged checkpoint is refused by name, and the one that the message names is gone on from."""
    attempt = harness.attempt(how, steps)
    trap = Trap("step", 3 * INTERVAL + 2, 0.0)
    harness.finish(replace(attempt, trap=trap))
    newest = RunDir(Path(attempt.out)).checkpoint(_newest(attempt))
    file = newest / harness.random.choice(["model.safetensors", "training.tensors"])
    if how == "truncated":
        os.truncate(file, harness.random.randrange(file.stat().st_size))
    elif how == "bit-flipped":
        content = bytearray(file.read_bytes())
        content[harness.random.randrange(len(content))] ^= 1 << harness.random.randrange(8)
        file.write_bytes(bytes(content))
    else:
        for path in list(newest.iterdir())[::2]:
            path.unlink()
    code = harness.finish(attempt)[0]
    said = harness.stderr(attempt)
    harness.expect(code == 2 and newest.name in said, f"{how}: exit code {code}, {said}")
    good = said.partition("--resume-from ")[2].split()
    if not harness.expect(bool(good), f"{how}: no good checkpoint named in {said!r}"):
        return False
    return harness.finish(replace(attempt, resume_from=good[0])) == [0] and harness.same(how, "undisturbed")


def clock(harness: Harness, steps: int) -> bool:
    """Nothing that is computed hangs on the wall clock."""
    attempt = replace(harness.attempt("clock", steps), jumping_clock=harness.random.randrange(1000))
    return harness.expect(harness.finish(attempt) == [0], "a jumping clock ended the run") and harness.same(
        "clock", "undisturbed"
    )


def lost_rank(harness: Harness, steps: int, signum: int) -> bool:
    """Two ranks, one killed (or stopped): the other ends by itself, and both go on from the last checkpoint."""
    name = "lost-rank" if signum == signal.SIGKILL else "stalled-rank"
    attempt = harness.attempt(name, steps)
    trap = Trap("step", harness.random.randint(INTERVAL + 1, steps - 5), 0.5, signum)
    healthy, hit = harness.start(replace(attempt, trap=trap), world_size=2, rank_timeout=5.0)
    code = harness.join(healthy, 60.0)
    harness.expect(code == os.EX_TEMPFAIL, f"{name}: the other rank ended in exit code {code}")
    hit.kill()
    harness.join(hit)
    return harness.finish(attempt, world_size=2) == [0, 0] and harness.same(name, "undisturbed-2")


def main() -> int:
    """Run all faults; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100 kills (under five minutes on two cores)")
    parser.add_argument("--kills", type=int, help="times to kill -9 (default 500, with --quick 100)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default %(default)s)")
    args = parser.parse_args()
    wanted = args.kills or (100 if args.quick else 500)
    steps = 120
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    begin = time.monotonic()
    try:
        harness = Harness(folder, args.seed)
        for name, world_size in (("undisturbed", 1), ("undisturbed-2", 2)):
            codes = harness.finish(harness.attempt(name, steps), world_size)
            harness.expect(codes == [0] * world_size, f"{name} ended in {codes}")
        figures = kills(harness, wanted, steps)
        faults = {
            "sigterm": sigterm(harness, steps),
            "disk_full": disk_full(harness, steps),
            **{how: damage(harness, steps, how) for how in ("truncated", "bit-flipped", "half-deleted")},
            "clock_jump": clock(harness, steps),
            "rank_killed": lost_rank(harness, steps, signal.SIGKILL),
            "rank_stalled": lost_rank(harness, steps, signal.SIGSTOP),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures |= {"faults": faults, "failures": harness.failures, "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps(figures))
    good = figures["survived"] == figures["kills"] and figures["bitwise_equal"] and all(faults.values())
    return 0 if good and not harness.failures else 1


if __name__ == "__main__":
    sys.exit(main())
