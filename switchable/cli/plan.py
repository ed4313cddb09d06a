"""`switchable plan`: what a run needs, before it is started."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from switchable.cli.flags import add_common, add_config_flags, add_dataclass_flags, given, given_flags
from switchable.options import check, fraction, option

HELP = "what a run needs: memory, traffic, checkpoints, the cost of a switch, the expected gain"


@dataclass(frozen=True)
class PlanConfig:
    """What a run will be made on."""

    world_size: int = option(1, "processes", least=1, most=10**6)
    gpu: str | None = option(None, "a100, h100 or h200; none: this machine, whose processor is measured")
    link: float | None = option(
        None,
        "what a rank sends to the others; none: the GPU's own link, right for ranks of one machine",
        least=1e-6,
        most=10**6,
        metavar="GB_PER_SECOND",
    )
    activation_ratio: float = fraction(
        0.1, "share of a layer's neurons that will fire on a token; `measure` lines of a short run have it"
    )
    utilization: float = option(
        0.4,
        "share of the peak (of large products' speed) that a run reaches; measure it with a short one",
        least=1e-6,
        most=1,
        metavar="FRACTION",
    )

    def __post_init__(self) -> None:
        check(self)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    add_dataclass_flags(verb, PlanConfig)
    add_common(verb)
    add_config_flags(verb)


def run(args: argparse.Namespace) -> int:
    """Print the figures as a table and as one JSON line."""
    asked, flags = given(PlanConfig, args), given_flags(args)
    from switchable.cli.output import finish
    from switchable.config import load
    from switchable.train.plan import device_here, device_named, estimates, plan

    gpu = None if asked.gpu is None else device_named(asked.gpu)
    # What a GPU would run is not what recipe `auto` is on this machine.
    config = load(args.config, flags if gpu is None else flags | {"device": "cuda"})
    found = plan(config, config.data.vocab_size, asked.world_size, asked.activation_ratio)
    device = gpu or device_here(config.train, asked.world_size)
    if asked.link is not None:
        device = replace(device, link=asked.link * 1e9)
    figures = vars(found) | estimates(found, config, asked.world_size, device, asked.utilization)
    if not args.quiet:
        print(f"{asked.world_size} x {device.name}, {config.train.precision}")
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
