"""`switchable convert`: an existing Hugging Face checkpoint becomes switchable."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.cli.flags import add_cache, add_dataclass_flags, add_out, given

HELP = "make an existing Hugging Face checkpoint switchable, its dense function unchanged"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    from switchable.adapt.config import AdaptConfig
    from switchable.data.config import DataConfig

    what = "folder of the checkpoint, with its tokenizer"
    verb.add_argument("model", metavar="MODEL", type=Path, help=what)
    add_out(verb, "folder to write", required=True)
    verb.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    add_cache(verb)
    add_dataclass_flags(verb.add_argument_group("text"), DataConfig, skip=("vocab_size",))
    add_dataclass_flags(verb.add_argument_group("conversion"), AdaptConfig)


def run(args: argparse.Namespace) -> int:
    """Convert; say what came of it, and the figures as one JSON line."""
    from switchable.adapt.config import AdaptConfig
    from switchable.data.config import DataConfig

    config, data = given(AdaptConfig, args), given(DataConfig, args)
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.adapt.run import adapt
    from switchable.cli.output import finish

    figures = adapt(args.model, data, config, args.out, args.cache, args.overwrite, args.quiet)
    saved = f"saved in {args.out}: the model, its dense function unchanged, with routers; conversion.json"
    then = ("switchable", "export", args.out, "--to", "sparse", "--out", f"{args.out}-sparse")
    finish(figures, args.out / "conversion.json", saved, then=then, show=not args.quiet)
    return 0
