"""When to switch: a pure function of the step and of what was measured.

    dense ──(some layer is sparse and its structure is stable)──> alternating ──(last part of the run)──> final dense

While alternating, `sparse_steps` sparse steps are followed by a dense one, over and over: a change of mode costs
nothing while the structure stands, and the dense steps keep both modes and the router together. Which layers take part
is decided per layer and by measurement: one that is not sparse (usually the first) stays dense.

Source of the phases: Zhang et al. 2024 (SSD); of the short returns: our measurements, docs/log/quality.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from switchable.settings import SwitchConfig
from switchable.switching.monitor import LayerMeasures

LEAVE_FACTOR = 1.25
"""A layer that takes part leaves when it misses a limit by this factor: no to and fro."""

SETTLE_FRACTION = 0.1
"""The share of the steps before a layer may join in which its structure stands, so that its router learns it: after 4 %
(82 of 2,332 steps) K by mass came out a half too large, after 18 % (382 of 2,082) right."""

MAX_EXPERT_FRACTION = 0.65
"""With a mass target: a layer that needs a larger fraction of its experts stays dense."""

ACTIVATION_TARGET = 0.12
"""Activation ratio down to which the penalty on activations is paid, per layer."""

NEVER_SPARSE = "it is trained all dense (min_dense_fraction=1, as in recipe dense)"
NOT_MEASURED = "no measurement was due yet while layers may join (monitor_every, final_dense_fraction)"


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
    why_dense: tuple[str, ...] = field(default=(), compare=False)
    """What keeps each layer out of sparse steps: what was measured against which limit; empty where nothing does."""
    activation_ratio: tuple[float, ...] = field(default=(), compare=False)
    """Each layer's, at the last measurement."""


@dataclass(frozen=True)
class Decision:
    """What to do after a measurement: the new state, and which layers get the structure just found."""

    state: ScheduleState
    regroup: tuple[bool, ...]


class Schedule:
    """The schedule of one run.

    Args:
        config: with a value for every setting.
        total_steps: optimizer steps of the whole run.
    """

    name = "ssd"
    """Kept with a run's state: another schedule cannot go on from it."""
    dense_steps = 1
    """Dense steps at each return."""

    def __init__(self, config: SwitchConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps

    @property
    def dense_until(self) -> int:
        """The first step (counted from 0) that may be sparse."""
        return round(self.config.min_dense_fraction * self.total_steps)

    @property
    def dense_from(self) -> int:
        """The first step (counted from 0) of the last dense phase; `total_steps` if there is none."""
        return self.total_steps - round(self.config.final_dense_fraction * self.total_steps)

    def initial(self, num_layers: int) -> ScheduleState:
        """Return the state at step 0: every layer dense."""
        return ScheduleState(
            takes_part=(False,) * num_layers,
            experts_per_token=(self.config.experts_per_token,) * num_layers,
            multiplies_active=(False,) * num_layers,
            activation_l1=(self.config.activation_l1,) * num_layers,
            why_dense=(NEVER_SPARSE if self.config.never_sparse else NOT_MEASURED,) * num_layers,
            activation_ratio=(1.0,) * num_layers,
        )

    def mode_at(self, step: int, state: ScheduleState) -> str:
        """Return the mode of step `step` (counted from 0): `"dense"` or `"sparse"`."""
        if state.began is None or step < state.began or step >= self.dense_from or not any(state.takes_part):
            return "dense"
        place = (step - state.began) % (self.config.sparse_steps + self.dense_steps)
        return "sparse" if place < self.config.sparse_steps else "dense"

    def phase_at(self, step: int, state: ScheduleState) -> str:
        """Return the phase of step `step`: `"dense"`, `"alternating"` or `"final dense"`."""
        if step >= self.dense_from:
            return "final dense"
        return "dense" if state.began is None or not any(state.takes_part) else "alternating"

    def is_measured(self, steps_done: int, state: ScheduleState) -> bool:  # noqa: ARG002 - a baseline needs it
        """Return whether a measurement is due after so many steps, at least one.

        Measurements are at multiples of `monitor_every`, the next one not before the steps have grown by
        `monitor_growth`: the pattern changes fast in a young model and slowly later on, and clustering costs as much as
        a few steps. One more is due when the first dense phase may end, so that no layer has to wait, in place of any
        shortly before: a layer that got a new structure there would join with a router that has not learned it yet.
        """
        return self.measured_until(steps_done) > self.measured_until(steps_done - 1)

    def measured_until(self, steps_done: int) -> int:
        """Return how many measurements are due in the first so many steps (see `is_measured`)."""
        every, until = self.config.monitor_every, self.dense_until
        if not every:
            return 0
        kept_free = 0 if self.config.never_sparse or until == 0 else max(every, SETTLE_FRACTION * until)
        before = max(0, math.floor(until - kept_free))
        if not kept_free or steps_done <= before:
            return self._due_numbers(steps_done // every)
        due = self._due_numbers(before // every)
        if steps_done >= until:
            due += 1 + self._due_numbers(steps_done // every) - self._due_numbers(until // every)
        return due

    def _due_numbers(self, most: int) -> int:
        """Return how many of 1 to `most` are due: each is the least that exceeds the one before by `monitor_growth`."""
        growth = self.config.monitor_growth
        found = most if growth == 1 else min(most, int(1 / (growth - 1)))  # up to there all are
        due = found + 1
        while due <= most:
            found, due = found + 1, max(due + 1, math.ceil(due * growth - 1e-9))
        return found

    def sparse_until(self, steps_done: int, state: ScheduleState) -> int:
        """Return how many of the first so many steps are sparse, if the state is this one all the time."""
        if state.began is None or not any(state.takes_part):
            return 0
        rounds, rest = divmod(
            max(0, min(steps_done, self.dense_from) - state.began),
            self.config.sparse_steps + self.dense_steps,
        )
        return rounds * self.config.sparse_steps + min(rest, self.config.sparse_steps)

    def groups_afresh(self, steps_done: int, state: ScheduleState) -> bool:
        """Return whether the measurement after so many steps tries groupings from scratch too, most of its time.

        Always where structures are compared. Otherwise only the last measurement before layers may join, whose
        structure they keep, and later ones while some layer has yet to join; up to there the structure at hand is
        carried along.
        """
        if self.config.stability_threshold > 0:
            return True
        until = self.dense_until
        if steps_done >= until:
            return steps_done > until and not all(state.takes_part)
        return self.measured_until(until - 1) == self.measured_until(steps_done)

    def decide(self, step: int, state: ScheduleState, measures: Sequence[LayerMeasures]) -> Decision:
        """Decide after a measurement taken when `step` steps are done.

        A layer joins when it is sparse (activation ratio and the mass that its experts catch, or the experts that the
        mass target needs) and stable (similarity of successive structures). Its structure follows every measurement
        before that one; once it takes part, its structure stands. In the last dense phase nothing is regrouped any
        more: sparse mode would have no time to learn it. With a `mass_target`, each layer's K follows every measurement
        to the end; whether its dense steps multiply active neurons only, and whether its activations are penalised,
        always does.
        """
        state = self._followed(state, measures)
        if self.config.never_sparse or step >= self.dense_from:
            return Decision(state, (False,) * len(measures))
        takes_part = self._who_takes_part(step, state, measures)
        regroup = self._who_is_regrouped(step, state, takes_part, measures)
        began = step if state.began is None and any(takes_part) else state.began
        why = tuple(
            "" if part else self._why_dense(step, m) for part, m in zip(takes_part, measures, strict=True)
        )
        return Decision(replace(state, takes_part=takes_part, why_dense=why, began=began), regroup)

    def _followed(self, state: ScheduleState, measures: Sequence[LayerMeasures]) -> ScheduleState:
        """Return the state with what follows from any measurement."""
        config = self.config
        return replace(
            state,
            experts_per_token=tuple(self.experts_needed(m) for m in measures),
            activation_ratio=tuple(m.activation_ratio for m in measures),
            multiplies_active=tuple(m.activation_ratio < config.active_below for m in measures),
            activation_l1=tuple(
                config.activation_l1 if m.activation_ratio > ACTIVATION_TARGET else 0.0 for m in measures
            ),
        )

    def experts_needed(self, measured: LayerMeasures) -> int:
        """Return K: the fewest experts of the router's choice that catch the mass asked for, or the settings' K."""
        target = self.config.mass_target
        if target is None:
            return self.config.experts_per_token
        enough = (k for k, mass in enumerate(measured.mass_by_k, start=1) if mass >= target)
        return next(enough, len(measured.mass_by_k))

    def _who_takes_part(
        self, step: int, state: ScheduleState, measures: Sequence[LayerMeasures]
    ) -> tuple[bool, ...]:
        may_join = step >= self.dense_until
        return tuple(
            self._stays(m) if part else may_join and self._is_sparse([m]) and self._is_stable([m])
            for part, m in zip(state.takes_part, measures, strict=True)
        )

    def _stays(self, measured: LayerMeasures) -> bool:
        return self._is_sparse([measured], slack=LEAVE_FACTOR)

    def _is_stable(self, measures: Sequence[LayerMeasures]) -> bool:
        """Whether the structures that were found in turn are alike, on average; with a threshold of 0 nobody asks."""
        threshold = self.config.stability_threshold
        return threshold == 0 or _mean([m.similarity for m in measures]) >= threshold

    def _is_sparse(self, measures: Sequence[LayerMeasures], slack: float = 1.0) -> bool:
        """Whether the layers, on average, count as sparse; `slack` is the factor by which they may miss a limit."""
        return not self._missed(measures, slack)

    def _missed(self, measures: Sequence[LayerMeasures], slack: float = 1.0) -> list[str]:
        """Return the limits of sparsity that the layers, on average, miss, each with what was measured.

        A small activation ratio is not enough: where other neurons fire on every token, K experts catch little of the
        mass, and a layer that joins so costs more than all others.
        """
        config, missed = self.config, []
        if config.mass_target is not None:
            used = _mean([self.experts_needed(m) / len(m.mass_by_k) for m in measures])
            if used > slack * MAX_EXPERT_FRACTION:
                missed.append(
                    f"mass_target={config.mass_target:g} takes {used:.2f} of its experts, above {MAX_EXPERT_FRACTION}"
                )
            return missed
        active = _mean([m.activation_ratio for m in measures])
        if active > slack * config.max_activation_ratio:
            missed.append(
                f"activation ratio {active:.3f}, above max_activation_ratio={config.max_activation_ratio:g}"
            )
        caught = _mean([m.mass_caught for m in measures])
        if slack * caught < config.min_mass_caught:
            missed.append(f"mass caught {caught:.3f}, below min_mass_caught={config.min_mass_caught:g}")
        return missed

    def _why_dense(self, step: int, measured: LayerMeasures) -> str:
        """Say what keeps a layer out of sparse steps after a measurement."""
        missed = self._missed([measured])
        if not self._is_stable([measured]):
            missed.append(
                f"similarity {measured.similarity:.3f}, below stability_threshold={self.config.stability_threshold:g}"
            )
        if step < self.dense_until:
            missed.append(f"no layer joins before step {self.dense_until} (min_dense_fraction)")
        return f"at step {step}: {', '.join(missed) or 'the mean over layers misses a limit'}"

    def _who_is_regrouped(
        self, step: int, state: ScheduleState, takes_part: Sequence[bool], measures: Sequence[LayerMeasures]
    ) -> tuple[bool, ...]:
        """Return which layers are given the structure just found: those that do not take part yet.

        One that joins goes on with the structure on which its router has learned and its K was measured, if it has one
        already.
        """
        del step  # a baseline's answer depends on it
        return tuple(
            not part and not (joins and m.pattern_similarity is not None)  # None: measured for the first time
            for part, joins, m in zip(state.takes_part, takes_part, measures, strict=True)
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
