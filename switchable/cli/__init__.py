"""`switchable VERB ...`: one verb per job, one module per verb.

A verb's module says what it is for (`HELP`), adds its arguments (`add_arguments`) and does its job (`run`, which
returns the exit code). None of them loads torch before it runs, so that `--help` and typing errors answer at once.

Wrong input ends in one or two lines on stderr and exit code 2; a run stopped by a signal in 128 + its number.
"""

from __future__ import annotations

import argparse
import os
import sys

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
    study,
)
from switchable.errors import InputError
from switchable.versions import __version__

VERBS = {
    "prepare": prepare,
    "pretrain": pretrain,
    "compare": compare,
    "convert": convert,
    "export": export,
    "generate": generate,
    "eval": evaluate,
    "finetune": finetune,
    "bench": bench,
    "study": study,
    "plan": plan,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return int(VERBS[args.verb].run(args))
    except InputError as error:
        if (
            os.environ.get("RANK", "0") == "0"
        ):  # under torchrun all ranks end with the same error; one says it
            print(f"switchable {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"switchable {args.verb}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say, and nobody to say it to.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - must stay open until the interpreter ends
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="switchable",
        description="Switchable sparse-dense pre-training: one set of weights, two ways to multiply.",
    )
    parser.add_argument("--version", action="version", version=f"switchable {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        module.add_arguments(verbs.add_parser(name, help=module.HELP))
    return parser
