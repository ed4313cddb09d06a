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
import dataclasses
import json
import math
import multiprocessing as mp
import random
import shutil
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from experiments.faults import WORDS, configuration
from experiments.fuzz_worker import attempt
from switchable.adapt.config import AdaptConfig
from switchable.cli import build_parser
from switchable.cli.bench import BenchConfig
from switchable.cli.flags import RESERVED
from switchable.cli.plan import PlanConfig
from switchable.config import to_dict
from switchable.data.config import DataConfig, ObjectiveConfig
from switchable.errors import InputError
from switchable.evaluation.config import EvalConfig
from switchable.finetune.config import FinetuneConfig
from switchable.finite import not_finite
from switchable.infer.sampling import Sampling
from switchable.options import build
from switchable.sections import ModelConfig, TrainConfig
from switchable.settings import BY_RECIPE, SwitchConfig
from switchable.study.config import StudyConfig
from switchable.train.pretrain import pretrain

CLASSES = (
    ModelConfig, DataConfig, ObjectiveConfig, TrainConfig, SwitchConfig, AdaptConfig, EvalConfig, FinetuneConfig,
    StudyConfig, Sampling, PlanConfig, BenchConfig,
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 1e-300, math.nan, math.inf, -math.inf, 1e30, 2**31 - 1, 2**60, 10**400, 2.5, True, "many", [1],
)  # fmt: skip
TEXTS = (
    "-1",
    "0",
    "1",
    "1e-300",
    "nan",
    "inf",
    "-inf",
    "1e30",
    str(2**31 - 1),
    str(2**60),
    str(10**400),
    "2.5",
)
SECONDS, GRACE = 20.0, 40.0
"""For a case, and for its stop after SIGTERM."""
STEPS = 6


def numeric_fields(cls: type) -> dict[str, Any]:
    """The fields of a configuration that hold numbers, and their types."""
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if {"int", "float"} & set(_names(hint))}


def _names(hint: Any) -> Iterator[str]:
    yield getattr(hint, "__name__", "")
    for part in typing.get_args(hint):
        yield from _names(part)


def constructed(cls: type, name: str, value: Any, as_text: bool) -> str | None:
    """What is wrong with how a class takes a value: None if it is refused, or kept as a number that can be used."""
    try:
        made = build(cls, {name: value}, "the flags") if as_text else cls(**{name: value})
    except InputError as error:
        return None if len(str(error)) < 400 else f"a message of {len(str(error))} characters"
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    kept = getattr(made, name)
    for number in kept if isinstance(kept, tuple) else (kept,):
        if number not in (None, BY_RECIPE) and not (
            isinstance(number, (int, float)) and math.isfinite(number)
        ):
            return f"it keeps {number!r}"
    return None


def constructors() -> tuple[int, list[str]]:
    """Try every field of every class; return how many were tried, and what failed."""
    tried, failures = 0, []
    for cls in CLASSES:
        for name in numeric_fields(cls):
            for as_text, values in ((False, NUMBERS), (True, (*TEXTS, *NUMBERS))):
                for value in values:
                    tried += 1
                    wrong = constructed(cls, name, value, as_text)
                    if wrong is not None:
                        failures.append(f"{cls.__name__}({name}={str(value)[:20]}): {wrong}")
    return tried, failures


@dataclass(frozen=True)
class Case:
    """One call of the command line."""

    verb: str
    flag: str
    """The flag, or the setting behind `--set`."""
    value: str
    arguments: tuple[str, ...]


def cases(only: Sequence[str] = (), values: Sequence[str] = TEXTS) -> Iterator[Case]:
    """Every numeric flag of the verbs with every value."""
    fields = {name for cls in CLASSES for name in numeric_fields(cls)}
    hidden = [
        f.name
        for cls in (ModelConfig, DataConfig, ObjectiveConfig, TrainConfig, SwitchConfig)
        for f in dataclasses.fields(cls)
        if not f.metadata["flag"] and f.name in numeric_fields(cls)
    ]
    for verb, parser in build_parser()[1].items():
        if only and verb not in only:
            continue
        for action in parser._actions:
            setting = action.dest.removeprefix(RESERVED)
            own = action.type in (int, float) or (verb == "compare" and action.dest in ("jobs", "seeds"))
            if own or (verb != "compare" and action.dest != setting and setting in fields):
                for value in values:
                    flag = action.option_strings[0]
                    yield Case(verb, flag, value, (f"{flag}={value}",))
            if action.dest == "set" and verb in ("pretrain", "plan", "prepare"):
                for name in hidden:
                    for value in values:
                        yield Case(verb, name, value, ("--set", f"{name}={value}"))


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
