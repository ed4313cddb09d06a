"""When to switch: a pure function of the step and of what was measured.

    dense ──(some layer is sparse and its pattern is stable)──> alternating ──(last part of the run)──> final dense

While alternating, `sparse_steps` sparse steps are followed by a dense one, over and over: a change of mode costs
nothing while the structure stands, and the dense steps keep both modes and the router together. Which layers take part
is decided per layer and by measurement: one that is not sparse (usually the first) stays dense.

Recipe `auto` weighs costs too (`costs.py`): a layer's dense steps multiply active neurons only where that is faster,
and before `min_dense_fraction` of the run it takes part as long as that saves clearly:

    seconds of its dense step  >=  SAVES · seconds of its sparse step

Source of the phases: Zhang et al. 2024 (SSD); of the short returns: our measurements, docs/log/quality.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from switchable.compute.measured import Costs
from switchable.settings import SwitchConfig
from switchable.switching.limits import ACTIVATION_TARGET, LEAVE_FACTOR, experts_needed, missed, moves
from switchable.switching.monitor import LayerMeasures
from switchable.switching.state import Change, Decision, ScheduleState
from switchable.switching.timetable import Timetable

SAVES = 1.5
"""How many times as long as its sparse step a layer's dense step must take for it to take part early: that costs 0.008
nats more than late sparse steps, which 4 to 5 % more tokens win back (docs/recipe.md); FFNs are a third of a step."""
NEVER_SPARSE = "it is trained all dense (min_dense_fraction=1, as in recipe dense)"
NOT_MEASURED = "no measurement was due yet while layers may join (monitor_every, final_dense_fraction)"


class Schedule(Timetable):
    """The schedule of one run of so many optimizer steps; `config` has a value for every setting."""

    name = "ssd"
    """Kept with a run's state: another schedule cannot go on from it."""
    dense_steps = 1
    """Dense steps at each return."""

    def __init__(self, config: SwitchConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self.costs: tuple[Costs, ...] = ()
        """Of each layer, where the recipe weighs them."""
        self.skips: Callable[[int, float], bool] = lambda _layer, _share: True
        """Whether a layer that is to leave out idle neurons does so here, with such a share of active ones."""
        self.penalised_from = 0
        """The step from which the penalty on activations is paid: in bfloat16 not while the model is young."""

    def initial(self, num_layers: int) -> ScheduleState:
        """Return the state at step 0: every layer dense."""
        # What nobody measures has no other beginning.
        waits = self.penalised_from and self.config.monitor_every
        return ScheduleState(
            takes_part=(False,) * num_layers,
            experts_per_token=(self.config.experts_per_token,) * num_layers,
            multiplies_active=(False,) * num_layers,
            activation_l1=(0.0 if waits else self.config.activation_l1,) * num_layers,
            why_dense=(NEVER_SPARSE if self.config.never_sparse else NOT_MEASURED,) * num_layers,
            activation_ratio=(1.0,) * num_layers,
            estimates=self.estimates_at(0),
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

    def sparse_until(self, steps_done: int, state: ScheduleState) -> int:
        """Return how many of the first so many steps are sparse, if the state is this one all the time."""
        if state.began is None or not any(state.takes_part):
            return 0
        sparse, since = self.config.sparse_steps, max(0, min(steps_done, self.dense_from) - state.began)
        rounds, rest = divmod(since, sparse + self.dense_steps)
        return rounds * sparse + min(rest, sparse)

    def groups_afresh(self, steps_done: int, state: ScheduleState) -> bool:
        """Return whether the measurement after so many steps tries groupings from scratch too, most of its time.

        Always where layers join as soon as their patterns are stable. Otherwise only the last measurement before all
        may join, whose structure they keep, and others while some layer has yet to join or nearly saves enough to; up
        to there the structure at hand is carried along.
        """
        if self.weighs:
            waits = zip(state.gains, state.takes_part, strict=True) if state.gains else ()
            if any(gain * LEAVE_FACTOR >= SAVES and not part for gain, part in waits):
                return True
        elif self.config.stability_threshold > 0:
            return True
        until = self.dense_until
        if steps_done >= until:
            return steps_done > until and not all(state.takes_part)
        return self.measured_until(until - 1) == self.measured_until(steps_done)

    def decide(self, step: int, state: ScheduleState, measures: Sequence[LayerMeasures]) -> Decision:
        """Decide after a measurement taken when `step` steps are done.

        A layer joins when it is sparse (activation ratio and the mass that its experts catch, or the experts that the
        mass target needs), stable (its activation pattern) and, where costs decide, cheap. Its structure follows every
        measurement before that one; once it takes part, its structure stands. In the last dense phase nothing is
        regrouped any more: sparse mode would have no time to learn it. With a `mass_target`, each layer's K follows
        every measurement to the end; whether its dense steps multiply active neurons only, and whether its activations
        are penalised, always does.
        """
        if self.estimates_at(step):
            measures = [each.estimated for each in measures]
        before, state = state, self._followed(step, state, measures)
        if self.config.never_sparse or step >= self.dense_from:
            return Decision(state, (False,) * len(measures), self._changes(step, before, state, measures))
        takes_part = self._who_takes_part(step, state, measures)
        regroup = self._who_is_regrouped(step, state, takes_part, measures)
        began = step if state.began is None and any(takes_part) else state.began
        why = tuple(
            "" if part else f"at step {step}: {self._why_dense(step, layer, m)}"
            for layer, (part, m) in enumerate(zip(takes_part, measures, strict=True))
        )
        state = replace(state, takes_part=takes_part, why_dense=why, began=began)
        return Decision(state, regroup, self._changes(step, before, state, measures))

    def _followed(self, step: int, state: ScheduleState, measures: Sequence[LayerMeasures]) -> ScheduleState:
        """Return the state with what follows from any measurement."""
        config = self.config
        penalty = config.activation_l1 if step >= self.penalised_from else 0.0
        early = self.estimates_at(step)
        # Where costs decide, no other limit is asked.
        ratios = tuple(0.0 if self.weighs else m.activation_ratio for m in measures)
        return replace(
            state,
            experts_per_token=tuple(experts_needed(config, m, early) for m in measures),
            activation_ratio=ratios,
            estimates=early,
            multiplies_active=tuple(
                self._few_active(layer, m) and self.skips(layer, ratio)
                for layer, (m, ratio) in enumerate(zip(measures, ratios, strict=True))
            ),
            gains=tuple(self._gain(layer, m) for layer, m in enumerate(measures)) if self.weighs else (),
            activation_l1=tuple(penalty * (m.activation_ratio > ACTIVATION_TARGET) for m in measures),
        )

    def _few_active(self, layer: int, measured: LayerMeasures) -> bool:
        """Whether a dense step of a layer is to multiply its active neurons only."""
        ratio = measured.activation_ratio
        pays = not self.weighs or self.costs[layer].active_at(ratio) < self.costs[layer].dense
        return pays and ratio < self.config.active_below

    def _gain(self, layer: int, measured: LayerMeasures) -> float:
        return self.costs[layer].gain(measured.activation_ratio, self._share(measured))

    def _share(self, measured: LayerMeasures) -> float:
        """Return K/E of a layer after a measurement."""
        return experts_needed(self.config, measured) / self.config.num_experts

    def _who_takes_part(
        self, step: int, state: ScheduleState, measures: Sequence[LayerMeasures]
    ) -> tuple[bool, ...]:
        return tuple(
            self._stays(step, layer, m) if part else not self._kept_out(step, layer, m)
            for layer, (part, m) in enumerate(zip(state.takes_part, measures, strict=True))
        )

    def _stays(self, step: int, layer: int, measured: LayerMeasures) -> bool:
        early = self.estimates_at(step)
        costly = early and self.weighs and self._costly(layer, measured, LEAVE_FACTOR)
        return not (costly or missed(self.config, [measured], LEAVE_FACTOR, early))

    def _kept_out(self, step: int, layer: int, measured: LayerMeasures) -> list[str]:
        """Return what keeps a layer from joining after a measurement."""
        early = self.estimates_at(step)
        found = missed(self.config, [measured], early=early)
        if early or not self.weighs:
            found += moves(self.config, [measured])
        if early and self.weighs:
            found += self._costly(layer, measured)
        if step < self.joins_from:
            found.append(f"no layer joins before step {self.joins_from} (min_dense_fraction)")
        return found

    def _costly(self, layer: int, measured: LayerMeasures, slack: float = 1.0) -> list[str]:
        """Return how little time a layer's sparse steps save, if it is too little to take them for its sake."""
        gain = self._gain(layer, measured)
        if gain * slack >= SAVES:
            return []
        return [f"a dense step takes {gain:.2f} times a sparse one, below {SAVES / slack:g}"]

    def _why_dense(self, step: int, layer: int, measured: LayerMeasures) -> str:
        """Say what keeps a layer out of sparse steps after a measurement."""
        return ", ".join(self._kept_out(step, layer, measured)) or "the mean over layers misses a limit"

    def _changes(
        self, step: int, before: ScheduleState, now: ScheduleState, measures: Sequence[LayerMeasures]
    ) -> tuple[Change, ...]:
        """Return which layers do something else from now on, each with the numbers that were compared."""
        return tuple(
            Change(layer, was, is_now, self._why(step, layer, was, is_now, measures[layer]))
            for layer, (was, is_now) in enumerate(zip(before.ways, now.ways, strict=True))
            if was != is_now
        )

    def _why(self, step: int, layer: int, was: str, now: str, measured: LayerMeasures) -> str:
        """Return the numbers that were compared where a layer does something else from now on."""
        told = f"{(ratio := measured.activation_ratio):.3f} of the neurons active"
        if self.weighs:
            told = f"{self.costs[layer].told(ratio, self._share(measured))}; {told}"
        elif "active" in (was, now):
            told += f", active_below={self.config.active_below:g}"
        if now == "sparse":
            early = self.estimates_at(step)
            told += f", {experts_needed(self.config, measured, early)} of {self.config.num_experts} experts"
            told += f", pattern similarity {measured.pattern_similarity or 0.0:.3f}"
            if self.weighs and not early:
                told += f"; from step {self.dense_until} on sparse mode is taught"
        elif was == "sparse":
            told += f"; {self._why_dense(step, layer, measured)}"
        elif was == "active" and self._few_active(layer, measured):
            told += "; leaving out the others does not pay here"
        return told

    def _who_is_regrouped(
        self, _step: int, state: ScheduleState, takes_part: Sequence[bool], measures: Sequence[LayerMeasures]
    ) -> tuple[bool, ...]:
        """Return which layers are given the structure just found: those that do not take part yet.

        One that joins goes on with the structure on which its router has learned and its K was measured, if it has one
        already.
        """
        return tuple(
            not part and not (joins and m.pattern_similarity is not None)  # None: measured for the first time
            for part, joins, m in zip(state.takes_part, takes_part, measures, strict=True)
        )
