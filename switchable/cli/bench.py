"""`switchable bench`: how fast a model's own layers multiply here, dense and sparse."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, given
from switchable.files import as_json
from switchable.options import Precision, option

HELP = "time a model's FFNs on this machine, dense against sparse with its own K"


@dataclass(frozen=True)
class BenchConfig(Precision):
    """What is timed."""

    tokens: tuple[int, ...] = option((1, 16, 512, 4096), "tokens at once", least=1, metavar="T")
    experts_per_token: int | None = option(None, "K in every layer; none: the model's own", metavar="K")
    seconds: float = option(1.0, "for each line", above=0, most=3600, metavar="S")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an export")
    verb.add_argument("--training", action="store_true", help="forward and backward instead of forward alone")
    add_dataclass_flags(verb, BenchConfig)


def run(args: argparse.Namespace) -> int:
    """Print the table, and the same as one JSON line."""
    asked = given(BenchConfig, args)
    from switchable.evaluation.bench import measure
    from switchable.store.find import trained_precision
    from switchable.store.load import load

    model, _ = load(args.folder)
    precision = asked.precision or trained_precision(args.folder)
    k, seconds = asked.experts_per_token, asked.seconds
    found = measure(model, asked.tokens, k, args.training, seconds, precision, show=print)
    print(as_json({"model": str(args.folder), **found}))
    return 0
