"""`switchable pretrain`: one run from text to a model that is dense and sparse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from switchable.cli.flags import add_common, add_config_flags, given_flags

HELP = "pre-train a model with SSD; --schedule dense trains all dense"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument(
        "--out", type=Path, default=Path("runs/pretrain"), help="folder of the run (default %(default)s)"
    )
    verb.add_argument("--resume", action="store_true", help="go on with the run in --out")
    verb.add_argument("--resume-from", metavar="STEP", help="checkpoint to go on from, e.g. step-000300")
    verb.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_common(verb)
    add_config_flags(verb)


def run(args: argparse.Namespace) -> int:
    """Train, and print the figures as one JSON line."""
    from switchable.config import check, load, to_flat
    from switchable.train.signals import TrainingStopped

    resuming = args.resume or args.resume_from
    flags = given_flags(args)
    given = flags if args.config is None else to_flat(args.config) | flags
    config = load(args.config, flags)
    if not resuming:
        check(config)
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.train.pretrain import pretrain, resume

    try:
        if resuming:
            figures = resume(args.out, given, args.cache, args.resume_from, args.quiet)
        else:
            figures = pretrain(config, args.out, args.cache, args.overwrite, args.quiet)
    except TrainingStopped as stopped:
        return 128 + int(stopped.args[0])
    print(json.dumps(figures))
    return 0
