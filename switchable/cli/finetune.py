"""`switchable finetune`: a trained model learns a classification task, dense or sparse."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "fine-tune a model on sst2, cola or rte, dense or sparse"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run or of a checkpoint")
    verb.add_argument("--task", required=True, metavar="TASK", help="sst2, cola or rte")
    verb.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="GLUE's folder")
    verb.add_argument(
        "--out", type=Path, metavar="FOLDER", help="save the fine-tuned model and results.json there"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    verb.add_argument(
        "--mode",
        choices=("dense", "sparse"),
        default="dense",
        help="how the FFNs multiply (default %(default)s)",
    )
    verb.add_argument("--experts-per-token", type=int, metavar="K", help="experts per token in sparse mode")
    verb.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default %(default)s)")
    verb.add_argument("--batch-size", type=int, default=32, help="examples per step (default %(default)s)")
    verb.add_argument(
        "--learning-rate", type=float, default=5e-5, help="peak learning rate (default %(default)s)"
    )
    verb.add_argument(
        "--max-length", type=int, default=128, help="longest input in tokens (default %(default)s)"
    )
    verb.add_argument(
        "--max-train-examples", type=int, metavar="N", help="train on the first N examples only"
    )
    verb.add_argument(
        "--seed", type=int, default=0, help="random seed of head and order (default %(default)s)"
    )
    verb.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    verb.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Fine-tune, and print a table of scores with standard errors, and the same as one JSON line."""
    from switchable.finetune.config import FinetuneConfig

    config = FinetuneConfig(
        task=args.task,
        mode=args.mode,
        experts_per_token=args.experts_per_token,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        max_length=args.max_length,
        max_train_examples=args.max_train_examples,
        seed=args.seed,
        device=args.device,
        threads=args.threads,
    )
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.evaluation.scores import table
    from switchable.finetune.classify import finetune

    scores, result = finetune(args.folder, args.data, config, args.out, args.overwrite, args.quiet)
    print(table(scores))
    print(json.dumps(result))
    return 0
