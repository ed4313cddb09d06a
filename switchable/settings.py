"""The settings of switching: experts, router, and when to change between dense and sparse steps.

    SwitchConfig(recipe="late", sparse_steps=5)       the recipe's table with one line changed

What is not given is the recipe's. Four settings depend on the model or the machine too: they stay `BY_RECIPE` until
the model is known, when `settled` fills them in (`convert` and `switchable pretrain` call it).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from switchable.errors import InputError, divisors_near
from switchable.options import check, fraction, option
from switchable.recipes import LEAST_NEURONS, PENALISED, RECIPES


class ByRecipe(enum.Enum):
    """Marks a setting that was not given (None is a value that can be given)."""

    BY_RECIPE = "by recipe"

    def __repr__(self) -> str:
        return "by recipe"


BY_RECIPE = ByRecipe.BY_RECIPE

OF_THE_MODEL = ("num_experts", "experts_per_token", "activation_l1", "active_below")
"""Settings whose recipe depends on the model, or on how fast the machine multiplies it."""


@dataclass(frozen=True)
class SwitchConfig:
    """How FFNs are cut into experts, how tokens choose them, and when steps are sparse.

    InputError: a value is not known, of the wrong type or out of range, or two do not fit together.
    """

    recipe: str = option(
        "early",
        "table of settings to start from: early = sparse steps save, from early on; late = dense steps multiply active "
        "neurons only, sparse ones come at the end; dense = never sparse; auto = sparse early in layers where that is "
        "measured to cost clearly less here, else as late",
        choices=tuple(RECIPES),
    )
    num_experts: int = option(BY_RECIPE, "experts per FFN; divides d_ff", least=1, metavar="E")
    experts_per_token: int = option(
        BY_RECIPE,
        "experts that each token computes in sparse mode; with a mass_target, where each layer starts",
        least=1,
        metavar="K",
    )
    mass_target: float | None = option(
        BY_RECIPE,
        "share of the activation mass that the router's experts must catch: each layer's experts_per_token follow from "
        "it at every measurement; none: they stay as they are",
        above=0,
        below=1,
        usual="0.95, or none",
        metavar="SHARE",
    )
    sparse_steps: int = option(BY_RECIPE, "sparse steps between single dense ones", least=1, metavar="STEPS")
    min_dense_fraction: float = fraction(
        BY_RECIPE, "fraction of all steps, at the start, that are always dense; 1 = never sparse"
    )
    final_dense_fraction: float = fraction(
        BY_RECIPE, "fraction of all steps, at the end, that are always dense", advanced=True
    )
    activation_l1: float = option(
        BY_RECIPE,
        "penalty in dense steps (in bfloat16 from a tenth of the run on), in layers where more than 12 % of the "
        "neurons are active: this times the sum of |activations|, mean over tokens (nats)",
        least=0,
        most=1000,
        usual="1e-4",
        metavar="NATS",
    )
    active_below: float = fraction(
        BY_RECIPE,
        "in layers whose activation ratio is below this, dense steps multiply only the neurons that are active: the "
        "same function and gradient, faster (ReLU or ReLU^2, on the CPU); 0 = never",
        flag=False,
    )
    max_activation_ratio: float = fraction(
        BY_RECIPE,
        "without a mass_target, and while products in 8 bits choose: largest activation ratio at which a layer counts "
        "as sparse; others stay dense",
        flag=False,
    )
    min_mass_caught: float = fraction(
        BY_RECIPE,
        "without a mass_target: least share of the activation mass in the router's experts at which a layer counts as "
        "sparse; others stay dense",
        flag=False,
    )
    stability_threshold: float = fraction(
        BY_RECIPE,
        "overlap (Jaccard index) of successive activation patterns from which a layer counts as stable; 0 = always",
        metavar="INDEX",
        advanced=True,
    )
    monitor_every: int = option(
        BY_RECIPE, "optimizer steps between measurements; 0 = never", least=0, metavar="STEPS", advanced=True
    )
    monitor_growth: float = option(
        BY_RECIPE,
        "factor by which the steps done grow from one measurement to the next, at least; 1 = every monitor_every steps",
        least=1,
        most=10,
        usual="1.1",
        metavar="FACTOR",
        flag=False,
    )
    router_token_fraction: float = fraction(
        BY_RECIPE, "fraction of a dense step's tokens that train the router", flag=False
    )
    backend: str = option("auto", "what multiplies the experts; auto = chosen for each call", advanced=True)

    def __post_init__(self) -> None:
        check(self, unset=BY_RECIPE)
        for name, value in RECIPES[self.recipe].items():
            if name not in OF_THE_MODEL and getattr(self, name) is BY_RECIPE:
                object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        experts, chosen = self.num_experts, self.experts_per_token
        if is_set(experts) and is_set(chosen) and chosen > experts:
            most = f"num_experts={experts}"
            raise InputError(f"experts_per_token={chosen} is more than {most}; use 1 to {experts}")
        if self.never_sparse:
            return
        if self.monitor_every == 0:
            raise InputError(
                "monitor_every=0 would never find a layer to make sparse; measure every 50 steps, say, or use recipe "
                "dense"
            )
        if self.router_token_fraction == 0:
            raise InputError(
                "router_token_fraction=0 (as in recipe dense) would never train the router of sparse steps; use more "
                "than 0, up to 1, or min_dense_fraction=1 for none"
            )

    @property
    def never_sparse(self) -> bool:
        """Whether no step of a run can be sparse, so that no layer needs experts and no router learns."""
        return self.min_dense_fraction == 1


def is_set(value: object) -> bool:
    """Return whether a setting has a value, given or from the recipe."""
    return value is not BY_RECIPE


def settled(
    config: SwitchConfig, d_ff: int, activation: str, least_neurons: int = LEAST_NEURONS
) -> SwitchConfig:
    """Return a configuration in which every setting has its value, for a model with FFNs of `d_ff` neurons.

    `activation` is a name in transformers' `ACT2FN`; experts get `least_neurons` or more. Raises InputError for
    settings that do not fit together.
    """
    given = {name: value for name, value in vars(config).items() if is_set(value)}
    table = dict(RECIPES[config.recipe])
    most, chosen = table["num_experts"], table["experts_per_token"]
    (experts,) = divisors_near(d_ff, min(most, max(1, d_ff // least_neurons)), count=1)
    experts = given.get("num_experts", experts)
    table |= {"num_experts": experts, "experts_per_token": max(1, experts * chosen // most)}
    if activation != PENALISED:
        table["activation_l1"] = 0.0
    return SwitchConfig(**(table | given))
