"""When to switch: a pure function of the step and of what was measured.

    dense ──(some layer is sparse and its structure is stable)──> alternating ──(last part of the run)──> final dense

(schedule `ssd`; of the others, `dense` never leaves the first phase, `static` is sparse ever after instead of
alternating, and `sparse` is that from the first step.)

While alternating, `sparse_steps` sparse steps are followed by `dense_steps` dense ones, over and over: a change of
mode costs nothing while the structure stands, and the dense steps keep both modes and the router together. Which
layers take part is decided per layer and by measurement: one that is not sparse (usually the first) stays dense.

Source of the phases: Zhang et al. 2024 (SSD); of the short returns: our measurements, docs/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from switchable.settings import SwitchConfig
from switchable.switching.monitor import LayerMeasures

EVER_SPARSE = ("static", "sparse")
"""Schedules that have no dense steps once they are sparse."""

LEAVE_FACTOR = 1.25
"""A layer that takes part leaves when it misses a limit by this factor: no to and fro."""

SETTLE_FRACTION = 0.1
"""The share of the steps before a layer may join in which its structure stands, so that its router learns it: after 4 %
(82 of 2,332 steps) K by mass came out a half too large, after 18 % (382 of 2,082) right (docs/LOG.md)."""


@dataclass(frozen=True)
class ScheduleState:
    """Where the schedule stands."""

    takes_part: tuple[bool, ...]
    """Whether each layer is sparse in sparse steps."""
    experts_per_token: tuple[int, ...]
    multiplies_active: tuple[bool, ...]
    """Whether each layer multiplies only its active neurons in dense steps."""
    activation_l1: tuple[float, ...]
    """Each layer's penalty on activations, in nats per unit."""
    began: int | None = None
    """The step at which alternating began; None before."""


@dataclass(frozen=True)
class Decision:
    """What to do after a measurement: the new state, and which layers get the structure just found."""

    state: ScheduleState
    regroup: tuple[bool, ...]


def initial(num_layers: int, config: SwitchConfig) -> ScheduleState:
    """Return the state at step 0: every layer dense, or with schedule `sparse` every layer sparse."""
    sparse = config.schedule == "sparse"
    return ScheduleState(
        takes_part=(sparse,) * num_layers,
        experts_per_token=(config.experts_per_token,) * num_layers,
        multiplies_active=(False,) * num_layers,
        activation_l1=(config.activation_l1,) * num_layers,
        began=0 if sparse else None,
    )


def dense_until(total_steps: int, config: SwitchConfig) -> int:
    """Return the first step (counted from 0) that may be sparse."""
    return round(config.min_dense_fraction * total_steps)


def dense_from(total_steps: int, config: SwitchConfig) -> int:
    """Return the first step (counted from 0) of the last dense phase; `total_steps` if there is none."""
    if config.schedule in EVER_SPARSE:
        return total_steps
    return total_steps - round(config.final_dense_fraction * total_steps)


def mode_at(step: int, state: ScheduleState, total_steps: int, config: SwitchConfig) -> str:
    """Return the mode of step `step` (counted from 0): `"dense"` or `"sparse"`."""
    if state.began is None or step < state.began or step >= dense_from(total_steps, config):
        return "dense"
    if not any(state.takes_part):
        return "dense"
    if config.schedule in EVER_SPARSE:
        return "sparse"
    place = (step - state.began) % (config.sparse_steps + config.dense_steps)
    return "sparse" if place < config.sparse_steps else "dense"


def is_measured(steps_done: int, total_steps: int, config: SwitchConfig) -> bool:
    """Return whether a measurement is due after so many steps, at least one.

    Measurements are at multiples of `monitor_every`, the next one not before the steps have grown by `monitor_growth`:
    the pattern changes fast in a young model and slowly later on, and clustering costs as much as a few steps. One more
    is due when the first dense phase may end, so that no layer has to wait, in place of any shortly before: a layer
    that got a new structure there would join with a router that has not learned it yet.
    """
    if not config.monitor_every:
        return False
    if config.schedule in ("ssd", "static"):
        until = dense_until(total_steps, config)
        if until - max(config.monitor_every, SETTLE_FRACTION * until) < steps_done <= until:
            return steps_done == until
    if steps_done % config.monitor_every:
        return False
    number, due = steps_done // config.monitor_every, 1
    while due < number:
        due = max(due + 1, math.ceil(due * config.monitor_growth - 1e-9))
    return due == number


def groups_afresh(steps_done: int, state: ScheduleState, total_steps: int, config: SwitchConfig) -> bool:
    """Return whether the measurement after so many steps tries groupings from scratch too, most of its time.

    Always where the schedule compares structures or takes them as they are found. Otherwise only the last measurement
    before layers may join, whose structure they keep, and later ones while some layer has yet to join; up to there the
    structure at hand is carried along.
    """
    compares = config.stability_threshold > 0 or config.regroup_below > 0
    if compares or config.regroup == "switch" or config.router == "weight_mean":
        return True
    until = dense_until(total_steps, config)
    if steps_done >= until:
        return steps_done > until and not all(state.takes_part)
    return not any(is_measured(step, total_steps, config) for step in range(steps_done + 1, until))


def enters_sparse(step: int, state: ScheduleState, total_steps: int, config: SwitchConfig) -> bool:
    """Return whether step `step` is sparse and the one before it dense, as far as the state now tells."""
    modes = [mode_at(s, state, total_steps, config) for s in (step - 1, step)]
    return modes == ["dense", "sparse"]


def phase_at(step: int, state: ScheduleState, total_steps: int, config: SwitchConfig) -> str:
    """Return the phase of step `step`: `"dense"`, `"alternating"` (or `"sparse"`), or `"final dense"`."""
    if step >= dense_from(total_steps, config):
        return "final dense"
    if state.began is None or not any(state.takes_part):
        return "dense"
    return "sparse" if config.schedule in EVER_SPARSE else "alternating"


def decide(
    step: int, state: ScheduleState, measures: Sequence[LayerMeasures], total_steps: int, config: SwitchConfig
) -> Decision:
    """Decide after a measurement taken when `step` steps are done.

    A layer joins when it is sparse (activation ratio and the mass that its experts catch, or the experts that the mass
    target needs) and stable (similarity of successive structures); its structure follows every measurement before that
    one. Once it takes part its structure stands, unless it has drifted too far (or, with `regroup="switch"`, until the
    next change to sparse). In the last dense phase nothing is regrouped any more: sparse mode would have no time to
    learn it. With a `mass_target`, each layer's K follows every measurement to the end; whether its dense steps
    multiply active neurons only, and whether its activations are penalised, always does.
    """
    experts = tuple(experts_needed(m, config) for m in measures)
    few_active = tuple(m.activation_ratio < config.active_below for m in measures)
    penalties = tuple(
        config.activation_l1 if m.activation_ratio > config.activation_target else 0.0 for m in measures
    )
    state = replace(state, experts_per_token=experts, multiplies_active=few_active, activation_l1=penalties)
    if config.schedule in ("dense", "sparse") or step >= dense_from(total_steps, config):
        return Decision(state, (False,) * len(measures))
    may_join = step >= dense_until(total_steps, config)
    if config.join == "together":
        takes_part = _together(state.takes_part, measures, may_join, config)
    else:
        takes_part = tuple(
            _takes_part(part, m, may_join, config) for part, m in zip(state.takes_part, measures, strict=True)
        )
    at_switch = enters_sparse(step, state, total_steps, config)
    regroup = tuple(
        _regroups(part, joins, m, at_switch, config)
        for part, joins, m in zip(state.takes_part, takes_part, measures, strict=True)
    )
    began = step if state.began is None and any(takes_part) else state.began
    return Decision(replace(state, takes_part=takes_part, began=began), regroup)


def experts_needed(measured: LayerMeasures, config: SwitchConfig) -> int:
    """Return K: the fewest experts of the router's choice that catch the mass asked for, or the K of the settings."""
    if config.mass_target is None:
        return config.experts_per_token
    enough = (k for k, mass in enumerate(measured.mass_by_k, start=1) if mass >= config.mass_target)
    return next(enough, len(measured.mass_by_k))


def _takes_part(part: bool, measured: LayerMeasures, may_join: bool, config: SwitchConfig) -> bool:
    if part:
        return config.schedule == "static" or _is_sparse([measured], config, slack=LEAVE_FACTOR)
    return may_join and _is_sparse([measured], config) and _is_stable([measured], config)


def _together(
    takes_part: tuple[bool, ...], measures: Sequence[LayerMeasures], may_join: bool, config: SwitchConfig
) -> tuple[bool, ...]:
    """All layers join at once, when their means pass, and none leaves."""
    if any(takes_part):
        return takes_part
    return (may_join and _is_sparse(measures, config) and _is_stable(measures, config),) * len(measures)


def _is_stable(measures: Sequence[LayerMeasures], config: SwitchConfig) -> bool:
    """Whether the structures that were found in turn are alike, on average; with a threshold of 0 nobody asks."""
    threshold = config.stability_threshold
    return threshold == 0 or _mean([m.similarity for m in measures]) >= threshold


def _is_sparse(measures: Sequence[LayerMeasures], config: SwitchConfig, slack: float = 1.0) -> bool:
    """Whether the layers, on average, count as sparse; `slack` is the factor by which they may miss a limit.

    A small activation ratio is not enough: where other neurons fire on every token, K experts catch little of the
    mass, and a layer that joins so costs more than all others (docs/LOG.md).
    """
    if config.mass_target is not None:
        used = _mean([experts_needed(m, config) / len(m.mass_by_k) for m in measures])
        return used <= slack * config.max_expert_fraction
    active = _mean([m.activation_ratio for m in measures])
    caught = _mean([m.mass_caught for m in measures])
    return active <= slack * config.max_activation_ratio and slack * caught >= config.min_mass_caught


def _regroups(
    part: bool, joins: bool, measured: LayerMeasures, at_switch: bool, config: SwitchConfig
) -> bool:
    """Whether a layer is given the structure just found.

    One that joins goes on with the structure on which its router has learned and its K was measured, if it has one
    already. A router that is the mean of the weights needs not learn, and with `regroup="switch"` every change to
    sparse means a new structure.
    """
    if not part:
        has_one = measured.pattern_similarity is not None  # there was a measurement before
        return not (joins and has_one) or config.router == "weight_mean" or config.regroup == "switch"
    if config.schedule == "static":
        return False
    return at_switch if config.regroup == "switch" else measured.similarity_in_use < config.regroup_below


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
