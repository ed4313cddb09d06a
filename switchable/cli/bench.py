"""`switchable bench`: how fast a model's own layers multiply here, dense and sparse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from switchable.errors import InputError

HELP = "time a model's FFNs on this machine, dense against sparse with its own K"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an export")
    verb.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[1, 16, 512, 4096],
        metavar="T",
        help="tokens at once (default 1 16 512 4096)",
    )
    verb.add_argument(
        "--experts-per-token", type=int, metavar="K", help="K in every layer (default: the model's own)"
    )
    verb.add_argument("--training", action="store_true", help="forward and backward instead of forward alone")
    verb.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the multiplications (default: the run's, else the weights')",
    )
    verb.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="for each line (default %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and the same as one JSON line."""
    if min(args.tokens) < 1:
        raise InputError(f"tokens={min(args.tokens)} is out of range; use whole numbers of at least 1")
    if not 0 < args.seconds <= 3600:
        raise InputError(f"seconds={args.seconds:g} is out of range; use a number above 0, at most 3600")
    from switchable.evaluation.bench import measure
    from switchable.store.load import load, run_config

    model, _ = load(args.folder)
    trained = run_config(args.folder)
    precision = args.precision or (trained.train.precision if trained else None)
    found = measure(
        model, args.tokens, args.experts_per_token, args.training, args.seconds, precision, show=print
    )
    print(json.dumps({"model": str(args.folder), **found}))
    return 0
