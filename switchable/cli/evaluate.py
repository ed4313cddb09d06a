"""`switchable eval`: a trained model on tasks and text, dense and sparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.cli.flags import RESERVED, add_dataclass_flags, given_flags
from switchable.errors import InputError

HELP = "evaluate a model on tasks (lm-eval) and text, dense and over a range of K"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from switchable.data.config import DataConfig
    from switchable.evaluation.config import EvalConfig

    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run or of a checkpoint")
    verb.add_argument(
        "--mode",
        dest=f"{RESERVED}mode",
        nargs="+",
        choices=("dense", "sparse"),
        default=argparse.SUPPRESS,
        help="how the FFNs multiply (default: both, if the model can)",
    )
    add_dataclass_flags(verb, EvalConfig)
    verb.add_argument(
        "--data",
        dest=f"{RESERVED}data",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="text files or folders: loss, perplexity, bits per byte",
    )
    add_dataclass_flags(verb, DataConfig, skip=("data", "val_fraction", "tokenizer", "vocab_size"))
    verb.add_argument("--out", type=Path, metavar="FILE", help="write the scores there too, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a table of scores with standard errors, and the same as one JSON line."""
    from switchable.coercion import build
    from switchable.data.config import DataConfig
    from switchable.evaluation.config import EvalConfig

    flags = given_flags(args)
    config, data = build(EvalConfig, flags, "the flags"), build(DataConfig, flags, "the flags")
    if not config.tasks and not data.data:
        raise InputError(
            "nothing to evaluate on; give --tasks, e.g. lambada=PATH, or text with --data, or both"
        )
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.evaluation.run import evaluate
    from switchable.evaluation.scores import table
    from switchable.files import as_json, write_json

    scores = evaluate(args.folder, config, data)
    result = {"model": str(args.folder), "scores": [score.to_dict() for score in scores]}
    if args.out is not None:
        write_json(args.out, result)
    print(table(scores))
    print(as_json(result))
    return 0
