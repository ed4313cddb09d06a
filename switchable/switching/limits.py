"""The limits that layers must keep to take part in sparse steps: whether they are sparse, whether their patterns move.

Each function says what is missed, with what was measured; nothing where nothing is. Several layers are judged by means.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from switchable.recipes import AUTO
from switchable.settings import SwitchConfig
from switchable.switching.monitor import LayerMeasures

LEAVE_FACTOR = 1.25
"""A layer that takes part leaves when it misses a limit by this factor: no to and fro."""

MAX_EXPERT_FRACTION = 0.65
"""With a mass target: a layer that needs a larger fraction of its experts stays dense."""
MAX_EARLY_FRACTION = 1 / 3
"""The same in early sparse steps by cost: a first layer needs half of them, and in one run that cost 0.006 nats."""
LEAST_EARLY_FRACTION = 0.094
"""The smallest share of its experts in early sparse steps with a mass target, unless costs decide: where a token trains
2 to 7 of 128, as the mass asks for in the middle of twelve layers, the model falls behind (docs/log/quality.md)."""

ACTIVATION_TARGET = 0.12
"""Activation ratio down to which the penalty on activations is paid, per layer."""


def experts_needed(config: SwitchConfig, measured: LayerMeasures, early: bool = False) -> int:
    """Return K: the fewest experts of the choice that catch the mass asked for, or the settings' K."""
    if (target := config.mass_target) is None:
        return config.experts_per_token
    least = round(LEAST_EARLY_FRACTION * config.num_experts) if early and config.recipe != AUTO else 1
    enough = (k for k, mass in enumerate(measured.mass_by_k, start=1) if mass >= target)
    return max(least, next(enough, len(measured.mass_by_k)))


def missed(
    config: SwitchConfig, measures: Sequence[LayerMeasures], slack: float = 1.0, early: bool = False
) -> list[str]:
    """Return the limits of sparsity that are missed by more than a factor.

    A small activation ratio is not enough: where other neurons fire on every token, K experts catch little of the
    mass, and a layer that joins so costs more than all others. With a `mass_target` it is a limit only `early`.
    """
    target, found = config.mass_target, []
    if target is not None:
        used = fmean(experts_needed(config, m) / len(m.mass_by_k) for m in measures)
        most = MAX_EARLY_FRACTION if early and config.recipe == AUTO else MAX_EXPERT_FRACTION
        if used > slack * most:
            found.append(f"mass_target={target:.3g} takes {used:.2f} of its experts, above {most:.2g}")
    active = fmean(m.activation_ratio for m in measures)
    limit, named = config.max_activation_ratio, "max_activation_ratio="
    if early and config.activation_l1 and limit > ACTIVATION_TARGET:  # sparse steps do not pay the penalty
        limit, named = ACTIVATION_TARGET, "what is penalised: "
    if (early or target is None) and active > slack * limit:
        found.append(f"activation ratio {active:.3f}, above {named}{limit:g}")
    caught = fmean(m.mass_caught for m in measures)
    if target is None and slack * caught < config.min_mass_caught:
        found.append(f"mass caught {caught:.3f}, below min_mass_caught={config.min_mass_caught:g}")
    return found


def moves(config: SwitchConfig, measures: Sequence[LayerMeasures]) -> list[str]:
    """Return how little successive activation patterns overlap, if that is less than the settings ask for."""
    alike = fmean(m.pattern_similarity or 0.0 for m in measures)  # the first has none before it
    if alike >= config.stability_threshold:
        return []
    return [f"pattern similarity {alike:.3f}, below stability_threshold={config.stability_threshold:g}"]
