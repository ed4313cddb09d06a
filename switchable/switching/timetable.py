"""The moments of a run: what follows from the settings and the number of steps alone."""

from __future__ import annotations

import math

from switchable.recipes import AUTO, RECIPES
from switchable.settings import SwitchConfig
from switchable.switching.state import ScheduleState

SETTLE_FRACTION = 0.1
"""The share of the steps before a layer may join in which its structure stands, so that its router learns it: after 4 %
(82 of 2,332 steps) K by mass came out a half too large, after 18 % (382 of 2,082) right."""


class Timetable:
    """When, in a run of so many optimizer steps, something may change; `config` has a value for every setting."""

    estimates = True
    """Whether sparse steps choose experts by products in 8 bits, but for the last ones."""

    def __init__(self, config: SwitchConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps

    @property
    def weighs(self) -> bool:
        """Whether costs decide, so that `costs` must be given before the first measurement."""
        return self.config.recipe == AUTO

    @property
    def dense_until(self) -> int:
        """The first step (counted from 0) that may be sparse; where costs decide, whatever it costs."""
        return round(self.config.min_dense_fraction * self.total_steps)

    @property
    def joins_from(self) -> int:
        """The first step from which a layer may take part."""
        return min(self.dense_until, self.young_until if self.weighs else self.total_steps)

    @property
    def young_until(self) -> int:
        """The first step at which a model is old enough for sparse steps, and in bfloat16 for a penalty."""
        return round(float(RECIPES["early"]["min_dense_fraction"]) * self.total_steps)

    @property
    def routed_from(self) -> int:
        """The step from which on the router chooses, for as many steps as `late` has: sparse mode is to be learned."""
        learned = round((1 - float(RECIPES["late"]["min_dense_fraction"])) * self.total_steps)
        last = max(0, self.dense_from - learned)
        return min(last, self.dense_until) if self.weighs else last

    def estimates_at(self, step: int) -> bool:
        """Return whether sparse steps from this one to the next measurement choose experts by products in 8 bits."""
        return self.estimates and max(step, self.joins_from) < self.routed_from

    @property
    def dense_from(self) -> int:
        """The first step (counted from 0) of the last dense phase; `total_steps` if there is none."""
        return self.total_steps - round(self.config.final_dense_fraction * self.total_steps)

    def is_measured(self, steps_done: int, state: ScheduleState) -> bool:  # noqa: ARG002 - a baseline needs it
        """Return whether a measurement is due after so many steps, at least one.

        Measurements are at multiples of `monitor_every`, the next one not before the steps have grown by
        `monitor_growth`: the pattern changes fast in a young model and slowly later on, and clustering costs as much as
        a few steps. One more is due when the router begins to choose, which needs another K, and one when the first
        dense phase may end, in place of any shortly before: a layer would join with a router new to its structure.
        """
        return self.measured_until(steps_done) > self.measured_until(steps_done - 1)

    def measured_until(self, steps_done: int) -> int:
        """Return how many measurements are due in the first so many steps (see `is_measured`)."""
        routed, due = self.routed_from, self._due
        if steps_done < routed or not self.config.monitor_every or not self.estimates_at(self.joins_from):
            return due(steps_done)
        return due(routed - 1) + 1 + due(steps_done) - due(routed)

    def _due(self, steps_done: int) -> int:
        """Return how many measurements are due, but for the one when the router begins to choose."""
        every, growth, until = self.config.monitor_every, self.config.monitor_growth, self.dense_until
        if not every:
            return 0
        if self.config.never_sparse or until == 0:
            return _numbers(steps_done // every, growth)
        before = max(0, math.floor(until - max(every, SETTLE_FRACTION * until)))
        found = _numbers(min(steps_done, before) // every, growth)
        if steps_done >= until:
            found += 1 + _numbers(steps_done // every, growth) - _numbers(until // every, growth)
        return found


def _numbers(most: int, growth: float) -> int:
    """Return how many of 1 to `most` are due: each is the least that exceeds the one before by `growth`."""
    found = most if growth == 1 else min(most, int(1 / (growth - 1)))  # up to there all are
    number = found + 1
    while number <= most:
        found, number = found + 1, max(number + 1, math.ceil(number * growth - 1e-9))
    return found
