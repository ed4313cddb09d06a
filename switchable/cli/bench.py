"""`switchable bench`: where sparse multiplication pays on this machine, measured, and kept for `auto`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "measure from what size on sparse FFNs are faster than dense ones on this machine"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    many: dict[str, Any] = {"type": _positive, "nargs": "+"}
    verb.add_argument(
        "--d-model", **many, default=[256, 512, 768], metavar="D", help="widths (default 256 512 768)"
    )
    verb.add_argument(
        "--d-ff", type=_positive, metavar="F", help="neurons per FFN (default 4 times the width)"
    )
    verb.add_argument("--num-experts", **many, default=[32], metavar="E", help="experts per FFN (default 32)")
    verb.add_argument(
        "--experts-per-token",
        type=_positive,
        metavar="K",
        help="experts per token (default 6/32 of the experts)",
    )
    verb.add_argument(
        "--tokens",
        **many,
        default=[1, 16, 256, 4096],
        metavar="T",
        help="tokens at once (default 1 16 256 4096)",
    )
    verb.add_argument("--activation", default="relu", help="activation of the FFN (default %(default)s)")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default %(default)s)"
    )
    verb.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    verb.add_argument("--inference-only", action="store_true", help="leave training out")
    verb.add_argument(
        "--check", action="store_true", help="measure what auto chose once more, and report the worst choice"
    )
    verb.add_argument("--again", action="store_true", help="measure anew what the table knows already")


def run(args: argparse.Namespace) -> int:
    """Print the table, and one JSON document as the last line."""
    from switchable.compute.break_even import Sweep, break_even

    sweep = Sweep(
        d_model=tuple(args.d_model),
        d_ff=args.d_ff,
        num_experts=tuple(args.num_experts),
        experts_per_token=args.experts_per_token,
        tokens=tuple(args.tokens),
        activation=args.activation,
        dtype=args.dtype,
        device=args.device,
        training=not args.inference_only,
    )
    break_even(sweep, again=args.again, check=args.check)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not possible; give 1 or more")
    return value
