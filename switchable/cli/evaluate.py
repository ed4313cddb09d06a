"""`switchable eval`: a trained model on tasks and text, dense and sparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, add_texts, given
from switchable.errors import InputError
from switchable.files import check_writable, read_json, write_json

HELP = "evaluate a model on tasks (lm-eval) and text, dense and over a range of K"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    from switchable.data.config import DataConfig
    from switchable.evaluation.config import EvalConfig

    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run, a checkpoint or an export")
    add_dataclass_flags(verb, EvalConfig)
    what = "text files or folders: loss, perplexity, bits per byte (default, without --tasks: the run's)"
    add_texts(verb, "data", what, nargs="+", metavar="TEXT")
    add_dataclass_flags(verb, DataConfig, skip=("data", "val_fraction", "tokenizer", "vocab_size"))
    place = "write the scores there too, as JSON, and the picture beside it"
    verb.add_argument("--out", type=Path, metavar="FILE", help=place)
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Print a table of scores with standard errors, and the same as one JSON line."""
    from switchable.data.config import DataConfig
    from switchable.evaluation.config import EvalConfig

    config, data = given(EvalConfig, args), given(DataConfig, args)
    picture = args.folder / "speed.png"
    if args.out is not None:
        _check_out(args.out)
        picture = args.out.with_name(f"{args.out.stem}-speed.png")
    if config.speed and args.folder.is_dir():
        check_writable(picture)
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.cli.output import finish
    from switchable.evaluation import speed
    from switchable.evaluation.run import evaluate
    from switchable.evaluation.scores import table

    scores, precision, weights, speeds = evaluate(args.folder, config, data, not args.quiet)
    result = {
        "model": str(args.folder),
        "precision": precision,
        "weights": weights,
        "scores": [score.to_dict() for score in scores],
    }
    if speeds:
        result["speed"] = [each.to_dict() for each in speeds]
        result["picture"] = str(picture)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
    print(table(scores))
    said = []
    if speeds:
        print(speed.table(speeds))
        speed.draw(speeds, f"{args.folder.resolve().name}, {precision}", picture)
        said = [f"picture: {picture}"]
    finish(result, args.out or "the table above; --out FILE writes them as JSON", *said)
    return 0


def _check_out(out: Path) -> None:
    """Raise InputError for a file that cannot be written, or that is something else than older scores."""
    check_writable(out)
    if not out.exists():
        return
    try:
        older = "scores" in read_json(out)
    except (OSError, ValueError, TypeError):
        older = False
    if not older:
        raise InputError(f"{out} exists and does not hold scores; choose another file with --out")
