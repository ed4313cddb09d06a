"""The schedule is a pure function: each rule by hand."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

from switchable import Controller, InputError, SwitchConfig, convert
from switchable.compare.baselines import PaperSchedule, SparseSchedule, StaticSchedule
from switchable.settings import settled
from switchable.switching.monitor import LayerMeasures
from switchable.switching.schedule import Schedule
from switchable.switching.state import ScheduleState

CONFIG = SwitchConfig(
    num_experts=32,
    experts_per_token=6,
    activation_l1=0.0,
    min_dense_fraction=0.1,
    final_dense_fraction=0.2,
    stability_threshold=0.5,
    max_activation_ratio=0.3,
    min_mass_caught=0.6,
    sparse_steps=3,
    active_below=0.0,
)
HUNDRED = Schedule(CONFIG, 100)


def changed(kind: type[Schedule] = Schedule, steps: int = 100, **changes: object) -> Schedule:
    """A schedule of 100 steps with other settings."""
    return kind(dataclasses.replace(CONFIG, **changes), steps)


def measured(ratio: float, alike: float | None, caught: float = 0.8) -> LayerMeasures:
    """A layer of which so many neurons are active, in a pattern that is so much like the one before."""
    by_k = (0.5, 0.8, 0.95, 1.0)
    router_by_k = (0.4, caught, 0.95, 1.0)
    return LayerMeasures(
        ratio, caught, by_k, router_by_k, caught, 1.5, experts_per_token=2, pattern_similarity=alike
    )


def alternating(*takes_part: bool, k: int = CONFIG.experts_per_token) -> ScheduleState:
    layers = len(takes_part)
    return ScheduleState(takes_part, (k,) * layers, (False,) * layers, (0.0,) * layers, True, began=10)


def test_dense_until_stable_sparse_and_allowed() -> None:
    state = HUNDRED.initial(2)
    early = HUNDRED.decide(9, state, [measured(0.1, 0.9)] * 2)
    assert early.state == state
    assert early.regroup == (True, True)
    assert HUNDRED.decide(10, state, [measured(0.1, 0.49)] * 2).state == state  # not stable
    one = HUNDRED.decide(10, state, [measured(0.4, 0.9), measured(0.1, 0.5)])
    assert one.state == alternating(False, True)
    whatever = changed(stability_threshold=0.0)  # the first pattern has none before it
    assert whatever.decide(10, state, [measured(0.1, None)] * 2).state == alternating(True, True)
    assert HUNDRED.decide(10, state, [measured(0.1, None)] * 2).state == state


def test_who_joins_keeps_the_structure_that_its_router_knows() -> None:
    later = measured(0.1, 0.5)
    measures = [later, measured(0.4, 0.5), measured(0.1, None)]
    decision = changed(stability_threshold=0.0).decide(75, HUNDRED.initial(3), measures)
    assert decision.state.takes_part == (True, False, True)
    # The last one has only now been measured for the first time.
    assert decision.regroup == (False, True, True)
    paper = changed(PaperSchedule)  # takes every structure as it is found
    assert paper.decide(10, paper.initial(1), [later]).regroup == (True,)


def test_a_structure_in_use_stands() -> None:
    state = alternating(True, True)
    decision = HUNDRED.decide(20, state, [measured(0.1, 0.0), measured(0.1, 0.9)])
    assert decision.regroup == (False, False)
    assert decision.state == state


def test_a_layer_leaves_when_it_is_no_longer_sparse_but_not_at_once() -> None:
    state = alternating(True)
    assert HUNDRED.decide(20, state, [measured(0.37, 0.9)]).state.takes_part == (True,)
    assert HUNDRED.decide(20, state, [measured(0.38, 0.9)]).state.takes_part == (False,)


def test_a_layer_joins_only_when_its_experts_catch_enough_of_the_mass() -> None:
    measures = [measured(0.1, 0.9, caught=0.59), measured(0.1, 0.9, caught=0.6)]
    assert HUNDRED.decide(10, HUNDRED.initial(2), measures).state == alternating(False, True)
    # Once it takes part it may fall to 0.6 / 1.25 = 0.48.
    fallen = [measured(0.1, 0.9, caught=0.481), measured(0.1, 0.9, caught=0.479)]
    assert HUNDRED.decide(20, alternating(True, True), fallen).state == alternating(True, False)


def test_k_is_the_fewest_experts_that_catch_the_mass_asked_for() -> None:
    # The router's first 1, 2, 3, 4 experts catch 0.5, 0.8, 0.95 and 1.
    four = {"num_experts": 4, "experts_per_token": 2, "final_dense_fraction": 0.0}
    half = changed(mass_target=0.8, **four)
    state = half.decide(92, half.initial(1), [measured(0.9, 0.9)]).state
    assert (state.takes_part, state.experts_per_token) == ((True,), (2,))  # however many neurons fire
    strict = changed(mass_target=0.9, **four)  # 3 of 4 are more than 0.65
    assert strict.decide(92, strict.initial(1), [measured(0.1, 0.9)]).state.takes_part == (False,)
    kept = strict.decide(96, state, [measured(0.9, 0.9)]).state
    assert kept == dataclasses.replace(state, experts_per_token=(3,))  # K follows to the end, the rest stands
    fixed = HUNDRED.decide(10, HUNDRED.initial(1), [measured(0.1, 0.9)])
    assert fixed.state.experts_per_token == (6,)


def test_products_in_8_bits_choose_until_the_router_does_in_the_last_steps() -> None:
    schedule = changed(mass_target=0.9, num_experts=4, experts_per_token=2, final_dense_fraction=0.0)
    measures = [dataclasses.replace(measured(0.1, 0.9), best_by_k=(0.99, 0.99, 0.99, 1.0))]
    state = schedule.decide(10, schedule.initial(1), measures).state
    assert (state.takes_part, state.experts_per_token, state.estimates) == ((True,), (1,), True)
    assert schedule.decide(91, state, measures).state == state
    state = schedule.decide(92, state, measures).state  # 0.92 of the run, where sparse steps of `late` begin
    assert (state.experts_per_token, state.estimates) == ((3,), False)
    assert ScheduleState.from_plain(state.plain()) == state
    for never in (changed(min_dense_fraction=0.92), changed(PaperSchedule)):
        assert not never.decide(10, never.initial(1), measures).state.estimates
    # As many sparse steps are left to it before a last dense phase.
    assert [changed(final_dense_fraction=share).routed_from for share in (0.05, 0.2, 0.95)] == [87, 72, 0]
    auto = partial(changed, recipe="auto", min_dense_fraction=0.92)
    assert [auto(final_dense_fraction=share).routed_from for share in (0.0, 0.05)] == [92, 87]
    assert changed(recipe="auto").routed_from == 10  # those that come by the clock are for it


@pytest.mark.parametrize("never_sparse", [False, True])
def test_dense_steps_multiply_active_neurons_wherever_few_are(never_sparse: bool) -> None:
    schedule = changed(active_below=0.05, **({"min_dense_fraction": 1.0} if never_sparse else {}))
    for step in (5, 50, 95):
        found = schedule.decide(step, schedule.initial(2), [measured(0.05, 0.9), measured(0.049, 0.0)])
        assert found.state.multiplies_active == (False, True)
    none = HUNDRED.decide(5, HUNDRED.initial(1), [measured(0.0, 0.9)]).state  # with active_below 0
    assert none.multiplies_active == (False,)


@pytest.mark.parametrize("never_sparse", [False, True])
def test_activations_are_penalised_wherever_more_than_the_target_are_active(never_sparse: bool) -> None:
    schedule = changed(activation_l1=1e-4, **({"min_dense_fraction": 1.0} if never_sparse else {}))
    begin = schedule.initial(2)
    assert begin.activation_l1 == (1e-4, 1e-4)  # until something is measured
    for step in (5, 50, 95):
        found = schedule.decide(step, begin, [measured(0.121, 0.9), measured(0.12, 0.0)])
        assert found.state.activation_l1 == (1e-4, 0.0)


@pytest.mark.parametrize(
    ("autocast", "weights", "first"), [(False, "float32", 0), (True, "float32", 10), (False, "bfloat16", 10)]
)
def test_in_bfloat16_activations_are_penalised_from_a_tenth_of_the_run_on(
    make_gpt2: Any, autocast: bool, weights: str, first: int
) -> None:
    model = make_gpt2("relu2").to(getattr(torch, weights))
    convert(model, SwitchConfig("late", activation_l1=1e-4))
    half = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    controller = Controller(model, torch.ones(1, 8, dtype=torch.int64), 100, precision=half)
    begin = controller.state
    assert set(begin.activation_l1) == {0.0 if first else 1e-4}
    assert {layer.ssd.activation_l1 for layer in controller.layers} == set(begin.activation_l1)
    unmeasured = SwitchConfig("dense", num_experts=8, activation_l1=1e-4, monitor_every=0)
    assert set(Controller(model, controller.probe, 100, unmeasured, precision=half).state.activation_l1) == {
        1e-4
    }
    measures = [measured(0.5, 0.9)] * len(controller.layers)
    for step in (9, 10):
        found = controller.schedule.decide(step, begin, measures).state.activation_l1
        assert set(found) == {1e-4 if step >= first else 0.0}


def test_modes_alternate_and_the_last_phase_is_dense() -> None:
    state = alternating(True)
    modes = [HUNDRED.mode_at(step, state)[0] for step in range(8, 19)]
    assert "".join(modes) == "ddsssdsssds"
    assert HUNDRED.mode_at(78, state) == "sparse"
    assert {HUNDRED.mode_at(step, state) for step in range(80, 100)} == {"dense"}
    assert [HUNDRED.phase_at(s, state) for s in (10, 79, 80)] == ["alternating", "alternating", "final dense"]
    assert HUNDRED.phase_at(50, HUNDRED.initial(1)) == "dense"


def test_nothing_is_regrouped_in_the_last_phase() -> None:
    assert HUNDRED.decide(80, HUNDRED.initial(1), [measured(0.1, 0.9)]).regroup == (False,)


def test_the_recipe_dense_never_switches() -> None:
    schedule = Schedule(settled(SwitchConfig("dense"), 256, "relu2"), 100)
    for step in (50, 100):
        decision = schedule.decide(step, schedule.initial(1), [measured(0.01, 1.0)])
        assert (decision.state.takes_part, decision.state.began, decision.regroup) == (
            (False,),
            None,
            (False,),
        )
        assert schedule.mode_at(50, decision.state) == "dense"


def test_a_static_schedule_is_sparse_ever_after_and_its_structure_stands() -> None:
    static = changed(StaticSchedule)
    joined = static.decide(10, static.initial(2), [measured(0.4, 0.9), measured(0.1, 0.9)])
    assert joined.regroup == (True, False)
    state = joined.state
    assert state == dataclasses.replace(alternating(False, True), estimates=False)
    assert [static.mode_at(s, state) for s in (9, 10, 50, 99)] == ["dense", "sparse", "sparse", "sparse"]
    assert static.phase_at(99, state) == "sparse"
    later = static.decide(90, state, [measured(0.1, 0.9), measured(0.9, 0.0)])
    assert later.state.takes_part == (True, True)  # the second stays whatever is measured
    assert later.regroup == (False, False)


def test_a_sparse_schedule_is_sparse_from_the_first_step() -> None:
    sparse = changed(SparseSchedule)
    state = sparse.initial(2)
    assert {sparse.mode_at(s, state) for s in range(100)} == {"sparse"}
    assert not any(sparse.is_measured(s, state) for s in range(1, 101))


def test_layers_that_join_together_go_by_their_means() -> None:
    paper = changed(PaperSchedule)
    start = paper.initial(2)
    almost = [measured(0.5, 0.9), measured(0.2, 0.9)]  # mean activation ratio 0.35 > 0.3
    assert paper.decide(10, start, almost).state == start
    unstable = [measured(0.1, 0.9), measured(0.1, 0.0)]  # mean similarity 0.45 < 0.5
    assert paper.decide(10, start, unstable).state == start
    passing = [measured(0.5, 0.9), measured(0.1, 0.1)]
    assert paper.decide(9, start, passing).state == start
    state = paper.decide(10, start, passing).state
    assert state == dataclasses.replace(alternating(True, True), estimates=False)
    assert paper.decide(20, state, [measured(0.9, 0.0)] * 2).state == state  # none leaves


def test_the_papers_schedule_regroups_at_switches_only() -> None:
    paper = changed(PaperSchedule, steps=40)  # a dense phase of 2.5 %: one step
    state = alternating(True)  # sparse 10 11 12, dense 13, sparse 14 ...
    for step, expected in ((13, False), (14, True), (15, False), (18, True)):
        assert paper.is_measured(step, state) == expected
        assert paper.decide(step, state, [measured(0.1, 0.9)]).regroup == (expected,), step


def test_measurements_thin_out_as_the_run_grows() -> None:
    def measured_at(schedule: Schedule, first: int, last: int) -> list[int]:
        state = schedule.initial(1)
        return [step for step in range(first, last + 1) if schedule.is_measured(step, state)]

    # Where the first dense phase may end, and none shortly before.
    assert measured_at(changed(steps=1030), 80, 149) == [103]
    often = changed(steps=1000, min_dense_fraction=0.8, monitor_every=10)
    # 800 of 1,000 steps, less a tenth: none between 720 and 800.
    assert measured_at(often, 700, 831) == [700, 710, 720, 800, 810, 820, 830]
    assert 103 not in measured_at(changed(steps=1030, min_dense_fraction=1.0), 80, 149)
    for growth, last, expected in (
        (1.0, 22, [5, 10, 15, 20]),
        (2.0, 90, [5, 10, 20, 40, 80]),
        (1.5, 90, [5, 10, 15, 25, 40, 60, 90]),  # 1 2 3 5 8 12 18
        (1.1, 85, [*range(5, 60, 5), 65, 75, 85]),  # ... 9 10 11, then 13 15 17
    ):
        assert measured_at(changed(steps=1000, monitor_every=5, monitor_growth=growth), 1, last) == expected
    never = changed(steps=1000, monitor_every=0, min_dense_fraction=1.0)
    assert measured_at(never, 1, 9) == []


def test_groupings_from_scratch_are_tried_only_where_they_matter() -> None:
    settings = {"min_dense_fraction": 0.92, "monitor_every": 50, "stability_threshold": 0.0}
    nobody_asks = changed(steps=1000, **settings)
    everyone, one_waits = alternating(True, True), alternating(True, False)
    measured = [step for step in range(1, 1001) if nobody_asks.is_measured(step, everyone)]
    assert measured == [*range(50, 850, 50), 920, 950, 1000]
    # The structure found after 800 steps is the one with which layers join after 920.
    assert [step for step in measured if nobody_asks.groups_afresh(step, everyone)] == [800]
    waiting = [step for step in measured if nobody_asks.groups_afresh(step, one_waits)]
    assert waiting == [800, 950, 1000]  # a layer that joins late gets a structure as good
    for other in (
        changed(steps=1000, **settings | {"stability_threshold": 0.1}),
        changed(PaperSchedule, **settings),
    ):
        assert all(other.groups_afresh(step, everyone) for step in measured)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="monitor_every=0 would never find a layer to make sparse"):
        SwitchConfig(monitor_every=0)
    assert SwitchConfig("dense", monitor_every=0).monitor_every == 0
    with pytest.raises(InputError, match=r"router_token_fraction=0 .* would never train the router"):
        SwitchConfig(router_token_fraction=0.0)
    with pytest.raises(InputError, match="experts_per_token=9 is more than num_experts=8; use 1 to 8"):
        SwitchConfig(num_experts=8, experts_per_token=9)
