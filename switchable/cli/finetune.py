"""`switchable finetune`: a trained model learns a classification task, dense or sparse."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, add_out, given

HELP = "fine-tune a model on sst2, cola or rte, dense or sparse"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    from switchable.finetune.config import FinetuneConfig

    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run or of a checkpoint")
    verb.add_argument("--data", required=True, type=Path, metavar="DIR", help="GLUE's folder")
    add_out(verb, "save the fine-tuned model and results.json there")
    verb.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    add_dataclass_flags(verb.add_argument_group("fine-tuning"), FinetuneConfig)
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Fine-tune, and print a table of scores with standard errors, and the same as one JSON line."""
    from switchable.finetune.config import FinetuneConfig

    config = given(FinetuneConfig, args)
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.cli.output import finish, opened_by_transformers
    from switchable.evaluation.scores import table
    from switchable.finetune.classify import finetune

    scores, result = finetune(args.folder, args.data, config, args.out, args.overwrite, args.quiet)
    print(table(scores))
    if args.out is None:
        said, place = "nothing was saved; the same with --out keeps the model", "the table above"
        then = ["switchable", *sys.argv[1:], "--out", f"{args.folder}-{config.task}"]
    else:
        said, place = f"saved in {args.out}: the classifier, and results.json", f"{args.out}/results.json"
        then = opened_by_transformers(args.out)
    finish(result, place, said, then=then, show=not args.quiet)
    return 0
