"""`switchable export`: a plain dense checkpoint, or a folder that transformers opens as a switchable model."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.files import as_json

HELP = "write a model for other tools: dense (plain checkpoint) or sparse (switchable)"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument(
        "folder", metavar="RUN", type=Path, help="folder of a run, a checkpoint or a converted model"
    )
    verb.add_argument(
        "--to",
        choices=("dense", "sparse"),
        required=True,
        help="dense: any tool opens it; sparse: AutoModelFor...from_pretrained does after switchable.register()",
    )
    verb.add_argument("--out", type=Path, required=True, help="folder to write")
    verb.add_argument(
        "--experts-per-token",
        type=int,
        nargs="+",
        metavar="K",
        help="experts per token the sparse folder starts with: one number, or one for each FFN (default: the model's)",
    )
    verb.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="largest file of weights (default %(default)s)",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace the model in --out")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written as one JSON line."""
    from switchable.store.export import export

    given = args.experts_per_token
    each = given[0] if given is not None and len(given) == 1 else given
    print(as_json(export(args.folder, args.to, args.out, each, args.max_shard_size, args.overwrite)))
    return 0
