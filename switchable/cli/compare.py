"""`switchable compare`: several ways to train the same model, side by side, and one table."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys

from switchable.cli.flags import add_common, add_config_flags, add_out, given_flags
from switchable.errors import InputError
from switchable.files import check_apart, check_writable
from switchable.options import checked

HELP = "train with several methods on the same data and initial weights; write one table"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    from switchable.compare.methods import METHODS

    verb.usage = "%(prog)s CONFIG [--methods METHOD ...] [--seeds SEED ...] [--out DIR] [FLAG ...]"
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    rows = [(name, method.summary) for name, method in METHODS.items()]
    rows.append(("NAME@FACTOR", "the same with so many times the steps, e.g. dense@0.66 or ssd@1.04"))
    verb.description = "methods:\n" + "\n".join(f"  {name:15} {summary}" for name, summary in rows)
    usual = ["dense", "ssd"]
    verb.add_argument("--methods", nargs="+", default=usual, metavar="METHOD", help="default: dense ssd")
    verb.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: 0")
    place = "folder of the comparison; what is finished is not trained again, what was interrupted goes on"
    add_out(verb, place, default="runs/compare")
    jobs = "runs at a time, each with cores / N threads unless threads are given (default %(default)s)"
    verb.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    add_common(verb)
    add_config_flags(verb, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, write the table, and print its figures as one JSON line."""
    from switchable.compare.methods import check_methods
    from switchable.compare.runs import others_finished, runs_of
    from switchable.config import load, objective_of

    if args.config is None:
        raise InputError("no configuration given; name a YAML file, e.g. configs/parity-quick.yaml")
    methods = check_methods(args.methods)
    seeds = tuple(dict.fromkeys(checked("--seeds", seed, int, least=0) for seed in args.seeds))
    jobs = checked("--jobs", args.jobs, int, least=1, most=cores())
    config = load(args.config, given_flags(args))
    threads = config.train.threads or max(1, cores() // jobs)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, threads=threads))
    runs = runs_of(config, methods, seeds, args.out)
    check_apart(args.out, config.data.sources)
    check_writable(args.out / "compare.json")
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.cli.output import finish
    from switchable.compare.report import headline, markdown, sentences, write_report
    from switchable.compare.supervise import Supervisor
    from switchable.data.tokens import prepare
    from switchable.progress import say

    say(
        f"comparison: {', '.join(methods)} with seed {', '.join(map(str, seeds))}: {len(runs)} runs, of "
        f"{config.train.steps:,} steps where NAME@FACTOR does not say otherwise, {jobs} at a time with {threads} "
        f"CPU thread{'s' * (threads > 1)} each; writes to {args.out}",
        not args.quiet,
    )
    if not all(run.finished() for run in runs):
        prepare(config.data, args.cache, objective=objective_of(config), progress=not args.quiet)
    supervisor = Supervisor(runs, args.cache, jobs, threads, args.quiet)
    signum = supervisor.train()
    if signum is not None:
        print(f"stopped; go on with: {shlex.join(['switchable', *sys.argv[1:]])}", file=sys.stderr)
        return 128 + signum
    finished = [run for run in runs if run.finished()]
    finished += others_finished(config, args.out, runs)
    if finished:
        table = write_report(finished, args.out)
        print(markdown(table))
        saved = f"saved in {args.out}: compare.md (the table), compare.png, compare.json, a folder per run"
        then = ("switchable", "study", finished[-1].path)
        figures, place = headline(table, args.out), args.out / "compare.json"
        finish(figures, place, saved, *sentences(table), then=then, show=not args.quiet)
    if supervisor.failed:
        whys = "; ".join(f"{name}: {why}" for name, why in supervisor.failed.items())
        raise InputError(f"{len(supervisor.failed)} of {len(runs)} runs failed ({whys})")
    return 0


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
