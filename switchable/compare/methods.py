"""The methods that are compared, each as a few changes to one configuration.

    config of a run = the user's configuration  +  the method's changes  +  the seed

What is the same in all: model, initial weights (a seed draws the same ones whatever the method, since neither
routers nor converting draw random numbers), data and their order, steps, optimizer and learning rate. What a method
takes over from the `switch` section is said in `keeps`; the rest of that section has its plain defaults, so that
tuning `ssd` leaves the others alone, and a dense run serves any recipe.

`ssd-paper` follows Zhang et al. 2024 (arXiv 2410.03440) as far as its abstract, figures and public clustering code
tell (docs/compare.md). Our assumptions, where nothing is known to us: all layers switch together when the mean
similarity of their activation patterns reaches the configuration's threshold; the lengths of the phases; K is that of
the configuration; in sparse steps the router learns through the straight-through gate, at the model's learning rate.

`NAME@FACTOR` is a method with so many times the steps, its learning rate falling accordingly (docs/compare.md).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from switchable.config import RunConfig
from switchable.errors import InputError, nearest
from switchable.recipes import AUTO, RECIPES
from switchable.sections import TrainConfig
from switchable.settings import SwitchConfig

EXPERTS = ("num_experts", "experts_per_token", "backend")
MEASURING = ("monitor_every", "monitor_growth")
ALL_DENSE = {"recipe": "dense", "num_experts": 1, "experts_per_token": 1}


@dataclass(frozen=True)
class Method:
    """One way to train. A value that is a function is called with the user's configuration."""

    summary: str  # one line, for tables and `--help`
    switch: Mapping[str, Any] = field(default_factory=dict)  # changes to the `switch` section
    train: Mapping[str, Any] = field(default_factory=dict)  # changes to the `train` section
    keeps: tuple[str, ...] | None = None
    """Settings of the `switch` section taken over from the user; None = all of them."""
    starts_from: str | None = None  # the method whose finished run this one goes on from


def _models_learning_rate(config: RunConfig) -> float:
    return config.train.learning_rate


METHODS: dict[str, Method] = {
    "dense": Method(
        "all dense, every neuron multiplied: no routers, no measuring",
        switch={**ALL_DENSE, "monitor_every": 0, "active_below": 0.0},
        train={"router_learning_rate": TrainConfig().router_learning_rate},
        keeps=(),
    ),
    "dense-active": Method(
        "all dense, but only active neurons are multiplied where they are few: no routers",
        switch=ALL_DENSE,
        train={"router_learning_rate": TrainConfig().router_learning_rate},
        keeps=(*MEASURING, "active_below", "activation_l1"),
    ),
    "ssd": Method("the configuration as given"),
    "ssd-paper": Method(
        "the paper's: weight-mean router, every layer, long phases, regrouped at each switch",
        switch={
            "max_activation_ratio": 1.0,
            "min_mass_caught": 0.0,
            "sparse_steps": lambda config: max(1, round(0.075 * config.train.steps)),
        },
        train={"router_learning_rate": _models_learning_rate},
        keeps=(*EXPERTS, *MEASURING, "stability_threshold"),
    ),
    "static": Method("clustered once, when ssd would begin, and sparse ever after"),
    "moe": Method(
        "a mixture of experts from the first step: softmax gates, load-balance loss, every layer",
        train={"router_learning_rate": _models_learning_rate},
        keeps=EXPERTS,
    ),
    "dense-then-moe": Method(
        "all dense; experts cut and routers trained at the end, the weights untouched",
        switch={"recipe": "dense", "min_dense_fraction": 1.0},
        starts_from="dense",
    ),
}

MOST_TIMES = 100.0  # largest factor of the steps

UNCOMPARED = ("threads", "device", "log_every", "checkpoint_every", "keep", "sample_prompt")
"""Settings of `train` that may differ from one start to the next: they alter neither results nor their spacing."""


def method_config(config: RunConfig, method: str, seed: int) -> RunConfig:
    """Return the user's configuration as a method changes it, for one seed of initial weights and data order.

    Raises InputError where the changes do not fit the user's settings.
    """
    chosen = named(method)
    steps = max(1, round(steps_factor(method) * config.train.steps))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    kept = dataclasses.asdict(config.switch)
    if chosen.keeps is not None:
        clock = kept["recipe"] == AUTO and kept["active_below"] == RECIPES[AUTO]["active_below"]
        # What the clock decides in recipe auto has no limit that another could have.
        kept = {n: kept[n] for n in chosen.keeps if not (clock and n == "active_below")}
    switch = SwitchConfig(**(kept | _resolved(chosen.switch, config)))
    train = dataclasses.replace(config.train, seed=seed, **_resolved(chosen.train, config))
    return dataclasses.replace(config, switch=switch, train=train)


def _resolved(changes: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    return {name: value(config) if callable(value) else value for name, value in changes.items()}


def named(name: str) -> Method:
    """Return a method by its name, with `@FACTOR` or without; InputError if that is not known or not possible."""
    base, at, factor = name.partition("@")
    if base not in METHODS:
        raise InputError(
            f"method {base!r} is not known{nearest(base, METHODS)}; use one or more of {', '.join(METHODS)}"
        )
    method = METHODS[base]
    if not at:
        return method
    steps_factor(name)
    if method.starts_from is not None:
        before = method.starts_from
        raise InputError(f"{name}: {base} goes on from a {before} run and has no steps of its own")
    return dataclasses.replace(method, summary=f"{method.summary}; {factor} times the steps")


def steps_factor(name: str) -> float:
    """Return the factor in a method's name, 1 without one; InputError if it is not above 0, up to `MOST_TIMES`."""
    _, at, factor = name.partition("@")
    if not at:
        return 1.0
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", factor) or not 0 < float(factor) <= MOST_TIMES:
        raise InputError(
            f"method {name!r}: after @ comes a factor of the steps above 0 and at most {MOST_TIMES:g}, e.g. ssd@1.04"
        )
    return float(factor)


def in_order(names: Collection[str]) -> list[str]:
    """Return methods in the order of `METHODS`, those with more steps behind those with fewer."""
    places = {name: place for place, name in enumerate(METHODS)}
    return sorted(set(names), key=lambda name: (places[name.partition("@")[0]], steps_factor(name)))


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return the methods named, without repetitions; InputError for none, or an unknown one."""
    if not names:
        raise InputError(f"no method given; use one or more of {', '.join(METHODS)}")
    for name in names:
        named(name)
    return tuple(dict.fromkeys(names))
