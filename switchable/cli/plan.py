"""`switchable plan`: what a run needs, before it is started."""

from __future__ import annotations

import argparse
from dataclasses import replace

from switchable.cli.flags import add_common, add_config_flags, given_flags
from switchable.files import as_json
from switchable.options import checked

HELP = "what a run needs: memory, traffic, checkpoints, the cost of a switch, the expected gain"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--world-size", type=int, default=1, help="processes (default %(default)s)")
    verb.add_argument("--gpu", default="h100", help="a100, h100 or h200 (default %(default)s)")
    verb.add_argument(
        "--link",
        type=float,
        metavar="GB_PER_SECOND",
        help="what a rank sends to the others; default: the GPU's own link, right for ranks of one machine",
    )
    verb.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="share of the GPU's peak that a run reaches; measure it with a short one (default %(default)s)",
    )
    add_common(verb)
    add_config_flags(verb)


def run(args: argparse.Namespace) -> int:
    """Print the figures as a table and as one JSON line."""
    from switchable.config import load
    from switchable.train.plan import device_named, estimates, plan

    checked("--world-size", args.world_size, int, least=1, most=10**6)
    checked("--utilization", args.utilization, float, least=1e-6, most=1)
    checked("--link", args.link, float | None, least=1e-6, most=10**6)
    config, device = load(args.config, given_flags(args)), device_named(args.gpu)
    if args.link is not None:
        device = replace(device, link=args.link * 1e9)
    found = plan(config, config.data.vocab_size, args.world_size)
    figures = vars(found) | estimates(found, config, args.world_size, device, args.utilization)
    if not args.quiet:
        for name, value in figures.items():
            print(f"{name:28} {_shown(name, value)}")
    print(as_json(figures))
    return 0


def _shown(name: str, value: float) -> str:
    if "bytes" in name or "memory" in name:
        return f"{value / 1e9:12.3f} GB"
    if "parameters" in name:
        return f"{value / 1e6:12.3f} million"
    if "step_flops" in name:
        return f"{value / 1e12:12.3f} TFLOP"
    return f"{value:12.4f}"
