"""`switchable eval`: a trained model on tasks and text, dense and sparse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from switchable.errors import InputError

HELP = "evaluate a model on tasks (lm-eval) and text, dense and over a range of K"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run or of a checkpoint")
    verb.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="lambada=PATH, sst2=PATH, cola=PATH, rte=PATH with local data, or names of lm-eval's tasks",
    )
    verb.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="text files or folders: loss, perplexity, bits per byte",
    )
    verb.add_argument(
        "--text-field", default="text", help="field of a record that holds the text (default %(default)s)"
    )
    verb.add_argument(
        "--document-separator", metavar="TEXT", help="text between the documents of a text file"
    )
    verb.add_argument("--max-text-mb", type=float, metavar="MB", help="stop reading after this much text")
    verb.add_argument(
        "--mode",
        nargs="+",
        choices=("dense", "sparse"),
        default=[],
        help="how the FFNs multiply (default: both, if the model can)",
    )
    verb.add_argument(
        "--experts-per-token", nargs="+", type=int, default=[], metavar="K", help="values of K in sparse mode"
    )
    verb.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default %(default)s)")
    verb.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="window of text (default: the training's)"
    )
    verb.add_argument("--limit", type=int, metavar="N", help="examples per task at most")
    verb.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    verb.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    verb.add_argument("--out", type=Path, metavar="FILE", help="write the scores there too, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print a table of scores with standard errors, and the same as one JSON line."""
    if not args.tasks and not args.data:
        raise InputError(
            "nothing to evaluate on; give --tasks, e.g. lambada=PATH, or text with --data, or both"
        )
    for name in ("batch_size", "limit", "sequence_length", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} is out of range; use a whole number of at least 1")
    from switchable.evaluation.run import EvalRequest, evaluate
    from switchable.evaluation.scores import table

    request = EvalRequest(
        folder=args.folder,
        tasks=tuple(args.tasks),
        data=tuple(args.data),
        text_field=args.text_field,
        document_separator=args.document_separator,
        max_text_mb=args.max_text_mb,
        modes=tuple(args.mode),
        experts_per_token=tuple(args.experts_per_token),
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        limit=args.limit,
        device=args.device,
        threads=args.threads,
    )
    scores = evaluate(request)
    result = {"model": str(args.folder), "scores": [score.to_dict() for score in scores]}
    if args.out is not None:
        from switchable.files import write_json

        write_json(args.out, result)
    print(table(scores))
    print(json.dumps(result))
    return 0
