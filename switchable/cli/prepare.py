"""`switchable prepare`: text -> tokenizer -> token files."""

from __future__ import annotations

import argparse

from switchable.cli.flags import add_common, add_config_flags, given_flags
from switchable.files import as_json

HELP = "text -> tokenizer -> token files (pretrain does it by itself)"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_common(verb)
    add_config_flags(verb, only=("data", "objective"))


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print where it is."""
    from switchable.config import load, objective_of
    from switchable.data.tokens import prepare

    config = load(args.config, given_flags(args))
    data = prepare(config.data, args.cache, objective=objective_of(config), progress=not args.quiet)
    print(
        as_json(
            {"train_tokens": data.train.tokens, "val_tokens": data.val.tokens, "folder": str(data.folder)}
        )
    )
    return 0
