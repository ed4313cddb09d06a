"""`switchable prepare`: text -> tokenizer -> token files."""

from __future__ import annotations

import argparse

from switchable.cli.flags import add_common, add_config_flags, given_flags

HELP = "text -> tokenizer -> token files (pretrain does it by itself)"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    add_common(verb)
    add_config_flags(verb, only=("data", "objective"))


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print where it is."""
    from switchable.cli.output import finish
    from switchable.config import load, objective_of
    from switchable.data.tokens import prepare

    config = load(args.config, given_flags(args), choose=False)
    data = prepare(config.data, args.cache, objective=objective_of(config), progress=not args.quiet)
    counts = f"{data.train.tokens:,} tokens to train on, {data.val.tokens:,} to validate on"
    saved = f"saved in {data.folder}: {counts}, and the tokenizer"
    figures = {"train_tokens": data.train.tokens, "val_tokens": data.val.tokens, "folder": str(data.folder)}
    finish(figures, data.folder / "meta.json", saved, show=not args.quiet)
    return 0
