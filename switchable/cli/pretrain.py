"""`switchable pretrain`: one run from text to a model that is dense and sparse.

Under torchrun every rank runs this verb with the same arguments; what each of them read and loaded is compared before
any work is done, so that ranks that were started differently end at once instead of waiting for one another.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from switchable.cli.flags import add_common, add_config_flags, add_out, given_flags
from switchable.cli.output import finish
from switchable.options import checked

if TYPE_CHECKING:
    from switchable.config import RunConfig

RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun (--max-restarts) has started the ranks again

HELP = "pre-train a model with SSD; --recipe dense trains all dense"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.usage = "%(prog)s [CONFIG] [--data PATH ...] [--out DIR] [FLAG ...]"
    add_out(verb, "folder of the run", default="runs/pretrain")
    verb.add_argument("--resume", action="store_true", help="go on with the run in --out")
    verb.add_argument("--resume-from", metavar="STEP", help="checkpoint to go on from, e.g. step-000300")
    verb.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    waits = "under torchrun: how long a rank waits for the others before it gives up (default %(default)g)"
    verb.add_argument("--rank-timeout", type=float, default=600.0, metavar="SECONDS", help=waits)
    add_common(verb)
    add_config_flags(verb)


def run(args: argparse.Namespace) -> int:
    """Train, and print the figures as one JSON line (on rank 0)."""
    checked("--rank-timeout", args.rank_timeout, float, above=0, most=10**6)
    if "RANK" in os.environ:
        return _run_ranks(args)
    given, _ = _read(args)
    return _train(args, given)


def _run_ranks(args: argparse.Namespace) -> int:
    """The same as one of several processes."""
    from switchable import ranks
    from switchable.store.rundir import RunDir
    from switchable.train.parallel import process_group, run_facts

    with process_group(args.rank_timeout):
        given, config = ranks.together(lambda: _read(args))
        arguments = {"--out": str(args.out), "--resume": args.resume, "--overwrite": args.overwrite}
        ranks.check_agreement(run_facts(config) | arguments)
        rundir = RunDir(args.out)
        if int(os.environ.get(RESTARTS, "0")) > 0 and ranks.on_main(rundir.is_ours):
            # torchrun started us again after a rank was lost, with the same command line: go on, if we had begun.
            args.resume = ranks.on_main(lambda: bool(rundir.steps()))
            args.overwrite = not args.resume
        try:
            with ranks.watched():
                return _train(args, given)
        except ranks.RankLost as lost:
            again = f"start all ranks again with --out {args.out} --resume"
            print(
                f"rank {ranks.rank()} lost contact with another ({lost}); {again}",
                file=sys.stderr,
                flush=True,
            )
            # Nothing can be agreed on any more, not even to part: leave at once, as the lost rank did.
            os._exit(os.EX_TEMPFAIL)


def _read(args: argparse.Namespace) -> tuple[dict[str, Any], RunConfig]:
    """Return the settings given and the configuration they make, with names for `auto`; torch is not loaded for it."""
    from switchable.config import check, load, read_yaml

    flags = given_flags(args)
    config = load(args.config, flags, choose=False)
    sections = {} if args.config is None else read_yaml(args.config)
    given = {name: value for values in sections.values() for name, value in values.items()} | flags
    if not (args.resume or args.resume_from):
        check(config)
    return given, config


def _train(args: argparse.Namespace, given: dict[str, Any]) -> int:
    # What a user can get wrong by typing has been refused by now, before torch is loaded.
    from switchable import ranks
    from switchable.config import load
    from switchable.store.rundir import RunDir
    from switchable.train.pretrain import pretrain, resume
    from switchable.train.signals import TrainingStopped

    try:
        if args.resume or args.resume_from:
            figures = resume(args.out, given, args.cache, args.resume_from, args.quiet)
        else:
            config = load(args.config, given_flags(args))
            figures = pretrain(config, args.out, args.cache, args.overwrite, args.quiet)
    except TrainingStopped as stopped:
        return 128 + int(stopped.args[0])
    if ranks.is_main():
        from switchable.study.report import write_run_report  # matplotlib takes a second to import
        from switchable.train.words import closing

        write_run_report(args.out)
        rundir = RunDir(args.out)
        said, then = closing(rundir, figures)
        finish(figures, rundir.summary, *said, then=then, show=not args.quiet)
    return 0
