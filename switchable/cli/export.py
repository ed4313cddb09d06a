"""`switchable export`: a plain dense checkpoint, or one with the routers beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.cli.flags import add_out

HELP = "write a model for other tools: dense (plain checkpoint) or sparse (switchable)"

WHAT = {
    "dense": "a plain checkpoint, which any tool opens",
    "sparse": "the same with its routers, a switchable model for switchable.load",
}


def add_arguments(verb: argparse.ArgumentParser) -> None:
    model = "folder of a run, a checkpoint or a converted model"
    verb.add_argument("folder", metavar="RUN", type=Path, help=model)
    forms = "; ".join(f"{to}: {what}" for to, what in WHAT.items())
    verb.add_argument("--to", choices=tuple(WHAT), required=True, help=forms)
    add_out(verb, "folder to write", required=True)
    k = "experts per token the sparse folder starts with: one number, or one for each FFN (default: the model's)"
    verb.add_argument("--experts-per-token", type=int, nargs="+", metavar="K", help=k)
    largest = "largest file of weights (default %(default)s)"
    verb.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help=largest)
    width = "of the weights; int8, sparse alone: in 8 bits besides, for generate (default: as they are)"
    verb.add_argument("--weights", choices=("float32", "bfloat16", "int8"), help=width)
    verb.add_argument("--overwrite", action="store_true", help="replace the model in --out")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written as one JSON line."""
    from switchable.cli.output import finish, opened_by_transformers
    from switchable.progress import say
    from switchable.store.export import export

    given = args.experts_per_token
    each = given[0] if given is not None and len(given) == 1 else given
    say(f"{args.to} export of {args.folder} to {args.out}: {WHAT[args.to]}")
    found = export(args.folder, args.to, args.out, each, args.max_shard_size, args.overwrite, args.weights)
    size = f"{found['parameters']:,} parameters, {found['bytes'] / 1e6:,.1f} MB in {found['weight_files']} file(s)"
    then = opened_by_transformers(args.out) if args.to == "dense" else ["switchable", "bench", args.out]
    finish(found, "the lines above", f"saved in {args.out}: {size}", then=then)
    return 0
