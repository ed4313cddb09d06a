"""When to switch: a pure function of the step and of what was measured.

    dense ──(some layer is sparse and its structure is stable)──> alternating ──(last part of the run)──> final dense

While alternating, `sparse_steps` sparse steps are followed by `dense_steps` dense ones, over and over: a change of
mode costs nothing while the structure stands, and the dense steps keep both modes and the router together. Which
layers take part is decided per layer and by measurement: one that is not sparse (usually the first) stays dense.

Source of the phases: Zhang et al. 2024 (SSD); of the short returns: our measurements, docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from switchable.switching.config import SwitchConfig
from switchable.switching.monitor import LayerMeasures

LEAVE_FACTOR = 1.25
"""A layer that takes part leaves when it exceeds the limit by this factor: no to and fro."""


@dataclass(frozen=True)
class ScheduleState:
    """Where the schedule stands. `began` is the step at which alternating began, None before."""

    takes_part: tuple[bool, ...]
    experts_per_token: tuple[int, ...]
    began: int | None = None


@dataclass(frozen=True)
class Decision:
    """What to do after a measurement: the new state, and which layers get the structure just found."""

    state: ScheduleState
    regroup: tuple[bool, ...]


def initial(num_layers: int, config: SwitchConfig) -> ScheduleState:
    """Return the state at step 0: every layer dense."""
    return ScheduleState((False,) * num_layers, (config.experts_per_token,) * num_layers)


def dense_until(total_steps: int, config: SwitchConfig) -> int:
    """Return the first step (counted from 0) that may be sparse."""
    return round(config.min_dense_fraction * total_steps)


def dense_from(total_steps: int, config: SwitchConfig) -> int:
    """Return the first step (counted from 0) of the last dense phase."""
    return total_steps - round(config.final_dense_fraction * total_steps)


def mode_at(step: int, state: ScheduleState, total_steps: int, config: SwitchConfig) -> str:
    """Return the mode of step `step` (counted from 0): `"dense"` or `"sparse"`."""
    if state.began is None or step < state.began or step >= dense_from(total_steps, config):
        return "dense"
    if not any(state.takes_part):
        return "dense"
    place = (step - state.began) % (config.sparse_steps + config.dense_steps)
    return "sparse" if place < config.sparse_steps else "dense"


def phase_at(step: int, state: ScheduleState, total_steps: int, config: SwitchConfig) -> str:
    """Return the phase of step `step`: `"dense"`, `"alternating"` or `"final dense"`."""
    if step >= dense_from(total_steps, config):
        return "final dense"
    return "alternating" if state.began is not None and any(state.takes_part) else "dense"


def decide(
    step: int, state: ScheduleState, measures: Sequence[LayerMeasures], total_steps: int, config: SwitchConfig
) -> Decision:
    """Decide after a measurement taken when `step` steps are done.

    A layer joins when it is sparse (activation ratio, or the experts that the mass target needs) and stable (similarity
    of successive structures); its structure follows every measurement until then. Once it takes part its structure
    stands, unless it has drifted too far. In the last dense phase nothing is regrouped any more: sparse mode would have
    no time to learn it. With a `mass_target`, each layer's K follows every measurement to the end.
    """
    experts = tuple(experts_needed(m, config) for m in measures)
    state = replace(state, experts_per_token=experts)
    if config.schedule == "dense" or step >= dense_from(total_steps, config):
        return Decision(state, (False,) * len(measures))
    takes_part = tuple(
        _takes_part(part, m, step >= dense_until(total_steps, config), config)
        for part, m in zip(state.takes_part, measures, strict=True)
    )
    regroup = tuple(
        not part or m.similarity_in_use < config.regroup_below
        for part, m in zip(state.takes_part, measures, strict=True)
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
    if config.mass_target is None:
        used, limit = measured.activation_ratio, config.max_activation_ratio
    else:
        used = experts_needed(measured, config) / len(measured.mass_by_k)
        limit = config.max_expert_fraction
    if part:
        return used <= LEAVE_FACTOR * limit
    return may_join and used <= limit and measured.similarity >= config.stability_threshold
