"""Every number that can be given, given wrongly: it is refused in a line, or it works.

    python -m experiments.fuzz [--quick] [--only VERB ...]

    constructors   every numeric field of every configuration class, from Python and as text (YAML, flags)
    verbs          every numeric flag of every verb, and every numeric setting of a run as `--set NAME=VALUE`

The values are -1, 0, 1, 1e-300, not a number, infinity, 1e30 and whole numbers of 31, 60 and 1,300 bits; 2.5 and True
besides where a whole number belongs. What is accepted runs, on a tiny model, with the memory and time of a process
bounded. What is still running when its time is up is asked to stop (SIGTERM) and must.

After each: exit code 0 or 2 (or that of the stop), no traceback, at most two lines where something is refused, no NaN
in any JSON that was printed or written, no weight that is not finite in any file. `compare` takes the settings of a run
from the same function as `pretrain`, so it is given its own numbers alone. --quick leaves out what would run.

The last line is one JSON document; the exit code is 0 only if there was no failure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from experiments.fault_harness import WORDS, configuration
from experiments.fuzz_cases import Case, cases, constructors
from experiments.fuzz_worker import attempt
from switchable.config import to_dict
from switchable.finite import not_finite
from switchable.train.pretrain import pretrain

SECONDS, GRACE = 20.0, 40.0
"""For a case, and for its stop after SIGTERM."""
STEPS = 6


class Places:
    """What the verbs are given: text, GLUE's data, a configuration, and a place for a finished run.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus, self.glue, self.run = folder / "corpus", folder / "glue", folder / "run"
        self.config = configuration(self.corpus, STEPS)

    def write(self) -> Places:
        """Write all but the run."""
        self.corpus.mkdir()
        generator = random.Random(0)

        def words(count: int) -> str:
            return " ".join(generator.choice(WORDS) for _ in range(count))

        for i in range(40):
            (self.corpus / f"{i:03d}.txt").write_text(words(120))
        (self.glue / "SST-2").mkdir(parents=True)
        for split in ("train", "dev"):
            lines = ["sentence\tlabel", *(f"{words(6)}\t{i % 2}" for i in range(24))]
            (self.glue / "SST-2" / f"{split}.tsv").write_text("\n".join(lines))
        plain = to_dict(self.config)
        plain["train"] |= {"probe_tokens": 128, "threads": 1}
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(plain))
        return self

    def base(self, verb: str, out: Path) -> list[str]:
        """The arguments that a verb cannot do without, its work being small."""
        text, cache, run = (
            ["--data", str(self.corpus)],
            ["--cache", str(self.folder / "cache")],
            str(self.run),
        )
        tiny, quiet = str(self.folder / "tiny.yaml"), ["--quiet"]
        return {
            "pretrain": [tiny, "--out", str(out), *cache, *quiet],
            "compare": [tiny, "--out", str(out), *cache, *quiet, "--methods", "dense"],
            "convert": [
                run, "--out", str(out), *text, *cache, *quiet, "--num-experts", "8", "--structure-tokens", "256",
                "--calibration-tokens", "256", "--eval-tokens", "256", "--sequence-length", "16",
                "--max-activation-ratio", "1", "--threads", "1",
            ],
            "export": [run, "--to", "sparse", "--out", str(out)],
            "generate": [run, "--prompt", "the cat", "--max-new-tokens", "4"],
            "eval": [run, *text, "--out", f"{out}.json", "--max-text-mb", "0.001", "--threads", "1"],
            "finetune": [
                run, "--data", str(self.glue), "--out", str(out), *quiet, "--epochs", "1", "--max-length", "16",
                "--threads", "1",
            ],
            "bench": [run, "--tokens", "4", "--seconds", "0.01"],
            "study": [run, "--out", str(out), *quiet],
            "recipes": [],
            "plan": [tiny, *quiet],
            "prepare": [tiny, *cache, *quiet],
        }[verb]  # fmt: skip


class Fuzz:
    """Tries cases, each in a process of its own.

    Args:
        folder: an empty folder to work in.
    """

    def __init__(self, folder: Path) -> None:
        self.places = Places(folder).write()
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["experiments.fuzz_worker"])
        torch.set_num_threads(1)
        pretrain(self.places.config, self.places.run, folder / "cache", quiet=True)

    def tried(self, case: Case) -> tuple[str, str | None]:
        """Run a case; return how it ended ("ran", "refused" or "stopped"), and what is wrong with that."""
        place = self.places.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        arguments = [case.verb, *self.places.base(case.verb, place / "out"), *case.arguments]
        process = self.context.Process(target=attempt, args=(arguments, str(place)))
        process.start()
        process.join(SECONDS)
        stopped = process.is_alive()
        if stopped:
            process.terminate()
            process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
            return "stopped", "it does not stop"
        said = (place / "stderr").read_text(errors="replace")
        ended = "stopped" if stopped else "refused" if process.exitcode == 2 else "ran"
        return ended, wrong_ending(process.exitcode, ended, said) or not_finite_in(place)


def wrong_ending(code: int | None, ended: str, said: str) -> str | None:
    """What is wrong with an exit code and what was said on the way."""
    if code not in (0, 2) and ended != "stopped":
        return f"exit code {code}: {said[-300:]}"
    if "Traceback" in said and code not in (143, -15):
        return f"a traceback: {said[-300:]}"
    if ended == "refused" and (not said.strip() or len(said.strip().splitlines()) > 2 or len(said) > 1500):
        return f"not one line: {said[:300]}"
    return None


def not_finite_in(place: Path) -> str | None:
    """The first file of a folder that holds a number which is not finite."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    for path in place.rglob("*.safetensors"):
        found = not_finite(load_file(path))
        if found is not None:
            return f"{path.relative_to(place)}: {found}"
    for path in (*place.rglob("*.json"), *place.rglob("*.jsonl"), place / "stdout"):
        lines = (
            path.read_text(errors="replace").splitlines() if path.suffix != ".json" else [path.read_text()]
        )
        for line in lines:
            if path.suffix or line.startswith("{"):
                try:
                    json.loads(line, parse_constant=refuse)
                except ValueError as error:
                    return f"{path.relative_to(place)}: not JSON ({error})"
    return None


def run(only: Sequence[str] = (), quick: bool = False) -> dict[str, Any]:
    """Try everything; return the figures."""
    begin = time.monotonic()
    tried, failures = constructors()
    ends: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        if not quick:
            fuzz = Fuzz(folder)
            for case in cases(only):
                ended, wrong = fuzz.tried(case)
                ends[ended] += 1
                verbs[case.verb] += 1
                if wrong is not None:
                    failures.append(f"{case.verb} {case.flag} {case.value[:20]}: {wrong}")
                    print(f"FAILED: {failures[-1]}", file=sys.stderr, flush=True)
                if ended == "stopped":
                    print(f"stopped: {case.verb} {case.flag} {case.value[:20]}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "constructors": tried, "calls": sum(ends.values()), **ends, "verbs": verbs,
        "failures": failures, "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def cli() -> int:
    """Parse the arguments, try, and print the figures; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="constructors only: seconds")
    parser.add_argument("--only", nargs="+", default=[], metavar="VERB", help="these verbs only")
    args = parser.parse_args()
    figures = run(args.only, args.quick)
    print(json.dumps(figures))
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(cli())
