"""`switchable VERB ...`: one verb per job. Flags are made from the config dataclasses, so there is one list of them.

Wrong input ends in one or two lines on stderr and exit code 2; a run stopped by a signal in 128 + its number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import typing
from pathlib import Path
from typing import Any

from switchable.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except InputError as error:
        print(f"switchable {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, and nobody to say it to.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - must stay open until the interpreter ends
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    import switchable

    parser = argparse.ArgumentParser(
        prog="switchable",
        description="Switchable sparse-dense pre-training: one set of weights, two ways to multiply.",
    )
    parser.add_argument("--version", action="version", version=f"switchable {switchable.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_prepare(verbs)
    _add_pretrain(verbs)
    _add_generate(verbs)
    return parser


def _add_prepare(verbs: Any) -> None:
    verb = verbs.add_parser("prepare", help="text -> tokenizer -> token files (pretrain does it by itself)")
    _add_common(verb)
    _add_config_flags(verb, only="data")
    verb.set_defaults(run=_prepare)


def _add_pretrain(verbs: Any) -> None:
    verb = verbs.add_parser("pretrain", help="pre-train a model with SSD; --schedule dense trains all dense")
    verb.add_argument(
        "--out", type=Path, default=Path("runs/pretrain"), help="folder of the run (default %(default)s)"
    )
    verb.add_argument("--resume", action="store_true", help="go on with the run in --out")
    verb.add_argument("--resume-from", metavar="STEP", help="checkpoint to go on from, e.g. step-000300")
    verb.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    _add_common(verb)
    _add_config_flags(verb)
    verb.set_defaults(run=_pretrain)


def _add_generate(verbs: Any) -> None:
    verb = verbs.add_parser("generate", help="write text with a trained model, dense or sparse")
    verb.add_argument("folder", metavar="RUN", type=Path, help="folder of a run or of a checkpoint")
    verb.add_argument("--prompt", default="", help="text to continue")
    verb.add_argument("--mode", choices=("dense", "sparse"), default="dense", help="how the FFNs multiply")
    verb.add_argument("--experts-per-token", type=int, metavar="K", help="experts per token in sparse mode")
    verb.add_argument(
        "--max-new-tokens", type=int, default=100, help="tokens to write at most (default %(default)s)"
    )
    verb.add_argument(
        "--temperature", type=float, default=0.8, help="0 = most probable token (default %(default)s)"
    )
    verb.add_argument(
        "--top-k", type=int, default=50, help="draw among so many tokens; 0 = all (default %(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")
    verb.set_defaults(run=_generate)


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file; flags override it")
    verb.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder for token files (default %(default)s)"
    )
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def default_cache() -> Path:
    """Return where token files are kept: `$XDG_CACHE_HOME/switchable`, else `~/.cache/switchable`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchable"


def _add_config_flags(verb: argparse.ArgumentParser, only: str | None = None) -> None:
    """Add one flag per config field, its help with unit and default; what is not given is not set."""
    from switchable.config import sections

    for section, cls in sections().items():
        if only is not None and section != only:
            continue
        group = verb.add_argument_group(section)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            many = typing.get_origin(hints[f.name]) is tuple
            group.add_argument(
                f"--{f.name.replace('_', '-')}",
                dest=f"config.{f.name}",
                default=argparse.SUPPRESS,
                nargs="+" if many else None,
                metavar=f.name.split("_")[-1].upper(),
                help=_help(f),
            )


def _help(f: dataclasses.Field[Any]) -> str:
    text = str(f.metadata["help"]).replace("%", "%%")
    choices = f.metadata.get("choices")
    named = f" [{', '.join(map(str, choices))}]" if choices else ""
    shown = "" if f.default in (None, ()) else f" (default {f.default})"
    return f"{text}{named}{shown}"


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    return {
        key.removeprefix("config."): value for key, value in vars(args).items() if key.startswith("config.")
    }


def _prepare(args: argparse.Namespace) -> int:
    from switchable.config import load
    from switchable.data.tokens import prepare

    config = load(args.config, _flags(args))
    data = prepare(config.data, args.cache, progress=not args.quiet)
    print(
        json.dumps(
            {"train_tokens": data.train.tokens, "val_tokens": data.val.tokens, "folder": str(data.folder)}
        )
    )
    return 0


def _pretrain(args: argparse.Namespace) -> int:
    from switchable.config import check, load, to_flat
    from switchable.train.signals import TrainingStopped

    resuming = args.resume or args.resume_from
    flags = _flags(args)
    given = flags if args.config is None else to_flat(args.config) | flags
    config = load(args.config, flags)
    if not resuming:
        check(config)
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.train.pretrain import pretrain, resume

    try:
        if resuming:
            figures = resume(args.out, given, args.cache, args.resume_from, args.quiet)
        else:
            figures = pretrain(config, args.out, args.cache, args.overwrite, args.quiet)
    except TrainingStopped as stopped:
        return 128 + int(stopped.args[0])
    print(json.dumps(figures))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from switchable.infer.generate import Sampling, generate_text
    from switchable.infer.load import load_switchable

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.seed)
    model, tokenizer = load_switchable(args.folder)
    if tokenizer is None:
        raise InputError(f"{args.folder} holds no tokenizer; give the folder of the run instead")
    print(generate_text(model, tokenizer, args.prompt, args.mode, args.experts_per_token, sampling))
    return 0
