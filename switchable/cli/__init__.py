"""`switchable VERB ...`: one verb per job, one module per verb.

A verb's module says what it is for (`HELP`), adds its arguments (`add_arguments`) and does its job (`run`, which
returns the exit code). None of them loads torch before it runs, so that `--help` and typing errors answer at once.

Wrong input ends in one or two lines on stderr and exit code 2; a run stopped by a signal in 128 + its number.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from switchable.cli import (
    bench,
    compare,
    convert,
    evaluate,
    export,
    finetune,
    generate,
    plan,
    prepare,
    pretrain,
    recipes,
    study,
)
from switchable.errors import InputError, nearest
from switchable.files import check_name, full_disk_told
from switchable.gone import GONE
from switchable.versions import __version__

VERBS = {
    "pretrain": pretrain, "compare": compare, "convert": convert, "export": export, "generate": generate,
    "eval": evaluate, "finetune": finetune, "bench": bench, "study": study, "recipes": recipes, "plan": plan,
    "prepare": prepare,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An `argparse` parser of many flags."""

    def error(self, message: str) -> NoReturn:
        """End the process with one line: the flags are many, and help lists them."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def refuse_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """End the process because of arguments that no flag takes."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        name = arguments[0].partition("=")[0]
        setting = name.removeprefix("--").replace("-", "_")
        why = f" is not known{nearest(name, flags)}"
        if setting in GONE:
            why = f" is gone; {GONE[setting].instead}"
        self.error(f"{arguments[0]!r}{why}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser, verbs = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        verbs[args.verb].refuse_unknown(unknown)
    try:
        for value in vars(args).values():
            if isinstance(value, Path):
                check_name(value)
        with full_disk_told(f"running {args.verb}", "free some space and start again"):
            return int(VERBS[args.verb].run(args))
    except InputError as error:
        # Under torchrun all ranks end with the same error: one says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"switchable {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"switchable {args.verb}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, and nobody to say it to.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - must stay open until the interpreter ends
        return 1


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and those of the verbs by name."""
    what = "Switchable sparse-dense pre-training: one set of weights, two ways to multiply."
    parser = Parser(prog="switchable", description=what, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"switchable {__version__}")
    places = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, module in VERBS.items():
        module.add_arguments(places.add_parser(name, help=module.HELP, allow_abbrev=False))
    return parser, places.choices
