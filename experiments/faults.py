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
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.fault_harness import INTERVAL, Harness
from experiments.fault_worker import PHASES, Attempt, Trap
from switchable.store.rundir import RunDir


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
