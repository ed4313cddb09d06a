"""`switchable bench`: how fast a model's own layers multiply here, dense and sparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, given_flags
from switchable.coercion import build
from switchable.files import as_json
from switchable.options import Precision, checked

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
    add_dataclass_flags(verb, Precision)
    verb.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="for each line (default %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, and the same as one JSON line."""
    for tokens in args.tokens:
        checked("--tokens", tokens, int, least=1)
    checked("--seconds", args.seconds, float, above=0, most=3600)
    asked = build(Precision, given_flags(args), "the flags").precision
    from switchable.evaluation.bench import measure
    from switchable.store.load import load, trained_precision

    model, _ = load(args.folder)
    precision = asked or trained_precision(args.folder)
    found = measure(
        model, args.tokens, args.experts_per_token, args.training, args.seconds, precision, show=print
    )
    print(as_json({"model": str(args.folder), **found}))
    return 0
