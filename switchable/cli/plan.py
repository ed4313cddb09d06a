"""`switchable plan`: what a run needs, before it is started."""

from __future__ import annotations

import argparse
from dataclasses import replace

from switchable.cli.flags import add_common, add_config_flags, given_flags
from switchable.options import checked

HELP = "what a run needs: memory, traffic, checkpoints, the cost of a switch, the expected gain"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--world-size", type=int, default=1, help="processes (default %(default)s)")
    verb.add_argument("--gpu", help="a100, h100 or h200 (default: this machine, whose processor is measured)")
    verb.add_argument(
        "--link",
        type=float,
        metavar="GB_PER_SECOND",
        help="what a rank sends to the others; default: the GPU's own link, right for ranks of one machine",
    )
    verb.add_argument(
        "--activation-ratio",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of a layer's neurons that will fire on a token; `measure` lines of a short run have it "
        "(default %(default)s)",
    )
    verb.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="share of the peak (of large products' speed) that a run reaches; measure it with a short one "
        "(default %(default)s)",
    )
    add_common(verb)
    add_config_flags(verb)


def run(args: argparse.Namespace) -> int:
    """Print the figures as a table and as one JSON line."""
    from switchable.cli.output import finish
    from switchable.config import load
    from switchable.train.plan import device_here, device_named, estimates, plan

    checked("--world-size", args.world_size, int, least=1, most=10**6)
    checked("--utilization", args.utilization, float, least=1e-6, most=1)
    checked("--activation-ratio", args.activation_ratio, float, least=0, most=1)
    checked("--link", args.link, float | None, least=1e-6, most=10**6)
    flags, gpu = given_flags(args), None if args.gpu is None else device_named(args.gpu)
    # What a GPU would run is not what recipe `auto` is on this machine.
    config = load(args.config, flags if gpu is None else flags | {"device": "cuda"})
    found = plan(config, config.data.vocab_size, args.world_size, args.activation_ratio)
    device = gpu or device_here(config.train, args.world_size)
    if args.link is not None:
        device = replace(device, link=args.link * 1e9)
    figures = vars(found) | estimates(found, config, args.world_size, device, args.utilization)
    if not args.quiet:
        print(f"{args.world_size} x {device.name}, {config.train.precision}")
        for name, value in figures.items():
            print(f"{name:28} {_shown(name, value)}")
    finish({"device": device.name, **figures}, None if args.quiet else "the table above")
    return 0


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return f"{'':12} give --link"
    if "seconds" in name:
        sizes = {"days": 86400, "hours": 3600, "minutes": 60, "s": 1, "ms": 1e-3}
        unit = next((unit for unit, size in sizes.items() if value >= size), "ms")
        return f"{value / sizes[unit]:12.3f} {unit}"
    if "bytes" in name or "memory" in name:
        return f"{value / 1e9:12.3f} GB"
    if "parameters" in name:
        return f"{value / 1e6:12.3f} million"
    if "step_flops" in name:
        return f"{value / 1e12:12.3f} TFLOP"
    return f"{value:12.4f}"
