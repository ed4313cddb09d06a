"""The schedule is a pure function: each rule by hand."""

from __future__ import annotations

import dataclasses

import pytest

from switchable import InputError, SwitchConfig
from switchable.switching.monitor import LayerMeasures
from switchable.switching.schedule import (
    ScheduleState,
    decide,
    enters_sparse,
    groups_afresh,
    initial,
    is_measured,
    mode_at,
    phase_at,
)

CONFIG = SwitchConfig(
    min_dense_fraction=0.1,
    final_dense_fraction=0.2,
    stability_threshold=0.5,
    max_activation_ratio=0.3,
    min_mass_caught=0.6,
    sparse_steps=3,
    dense_steps=1,
    regroup_below=0.4,
    active_below=0.0,
)


def measured(ratio: float, similarity: float, in_use: float = 1.0, caught: float = 0.8) -> LayerMeasures:
    return LayerMeasures(ratio, caught, (0.5, 0.8, 0.95, 1.0), 0.95, 1.5, similarity, in_use)


def alternating(*takes_part: bool, k: int = CONFIG.experts_per_token) -> ScheduleState:
    layers = len(takes_part)
    return ScheduleState(takes_part, (k,) * layers, (False,) * layers, (0.0,) * layers, began=10)


def test_dense_until_stable_sparse_and_allowed() -> None:
    state = initial(2, CONFIG)
    early = decide(9, state, [measured(0.1, 0.9)] * 2, 100, CONFIG)
    assert early.state == state
    assert early.regroup == (True, True)
    unstable = decide(10, state, [measured(0.1, 0.49)] * 2, 100, CONFIG)
    assert unstable.state == state
    one = decide(10, state, [measured(0.4, 0.9), measured(0.1, 0.5)], 100, CONFIG)
    assert one.state == alternating(False, True)
    whatever = dataclasses.replace(
        CONFIG, stability_threshold=0.0
    )  # the index of chance groupings may be below 0
    assert decide(10, state, [measured(0.1, -0.01)] * 2, 100, whatever).state == alternating(True, True)


def test_who_joins_keeps_the_structure_that_its_router_knows() -> None:
    later = dataclasses.replace(measured(0.1, 0.9), pattern_similarity=0.5)
    measures = [later, dataclasses.replace(later, activation_ratio=0.4), measured(0.1, 0.9)]
    decision = decide(10, initial(3, CONFIG), measures, 100, CONFIG)
    assert decision.state.takes_part == (True, False, True)
    assert decision.regroup == (
        False,
        True,
        True,
    )  # the last one has only now been measured for the first time
    for changes in ({"router": "weight_mean"}, {"regroup": "switch"}):
        config = dataclasses.replace(CONFIG, **changes)
        assert decide(10, initial(1, config), [later], 100, config).regroup == (True,)


def test_a_structure_in_use_stands_unless_it_has_drifted() -> None:
    state = alternating(True, True)
    decision = decide(
        20, state, [measured(0.1, 0.9, in_use=0.39), measured(0.1, 0.9, in_use=0.4)], 100, CONFIG
    )
    assert decision.regroup == (True, False)
    assert decision.state == state


def test_a_layer_leaves_when_it_is_no_longer_sparse_but_not_at_once() -> None:
    state = alternating(True)
    assert decide(20, state, [measured(0.37, 0.9)], 100, CONFIG).state.takes_part == (True,)
    assert decide(20, state, [measured(0.38, 0.9)], 100, CONFIG).state.takes_part == (False,)


def test_a_layer_joins_only_when_its_experts_catch_enough_of_the_mass() -> None:
    measures = [measured(0.1, 0.9, caught=0.59), measured(0.1, 0.9, caught=0.6)]
    assert decide(10, initial(2, CONFIG), measures, 100, CONFIG).state == alternating(False, True)
    # Once it takes part it may fall to 0.6 / 1.25 = 0.48.
    fallen = [measured(0.1, 0.9, caught=0.481), measured(0.1, 0.9, caught=0.479)]
    assert decide(20, alternating(True, True), fallen, 100, CONFIG).state == alternating(True, False)


def test_k_is_the_fewest_experts_that_catch_the_mass_asked_for() -> None:
    # The router's first 1, 2, 3, 4 experts catch 0.5, 0.8, 0.95 and 1.
    config = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2, mass_target=0.8)
    decision = decide(10, initial(1, config), [measured(0.9, 0.9)], 100, config)
    assert decision.state == alternating(True, k=2)  # 2 of 4 experts, however many neurons fire
    strict = dataclasses.replace(config, mass_target=0.9)
    assert decide(10, initial(1, strict), [measured(0.1, 0.9)], 100, strict).state.takes_part == (False,)
    kept = decide(90, decision.state, [measured(0.9, 0.9)], 100, strict).state
    assert kept == alternating(True, k=3)  # K follows to the end, the rest stands
    assert decide(10, initial(1, CONFIG), [measured(0.1, 0.9)], 100, CONFIG).state.experts_per_token == (6,)


def test_dense_steps_multiply_active_neurons_wherever_few_are() -> None:
    measures = [measured(0.05, 0.9), measured(0.049, 0.0)]
    for schedule in ("ssd", "dense"):
        config = dataclasses.replace(CONFIG, schedule=schedule, active_below=0.05)
        for step in (5, 50, 95):
            assert decide(step, initial(2, config), measures, 100, config).state.multiplies_active == (
                False,
                True,
            )
    never = decide(5, initial(1, CONFIG), [measured(0.0, 0.9)], 100, CONFIG).state  # with 0
    assert never.multiplies_active == (False,)


def test_activations_are_penalised_wherever_more_than_the_target_are_active() -> None:
    measures = [measured(0.061, 0.9), measured(0.06, 0.0)]
    for schedule in ("ssd", "dense"):
        config = dataclasses.replace(CONFIG, schedule=schedule, activation_l1=1e-4, activation_target=0.06)
        begin = initial(2, config)
        assert begin.activation_l1 == (1e-4, 1e-4)  # until something is measured
        for step in (5, 50, 95):
            assert decide(step, begin, measures, 100, config).state.activation_l1 == (1e-4, 0.0)
    always = dataclasses.replace(CONFIG, activation_l1=1e-4)
    assert decide(5, initial(1, always), [measured(1e-3, 0.9)], 100, always).state.activation_l1 == (1e-4,)


def test_modes_alternate_and_the_last_phase_is_dense() -> None:
    state = alternating(True)
    modes = [mode_at(step, state, 100, CONFIG)[0] for step in range(8, 19)]
    assert "".join(modes) == "ddsssdsssds"
    assert mode_at(78, state, 100, CONFIG) == "sparse"
    assert {mode_at(step, state, 100, CONFIG) for step in range(80, 100)} == {"dense"}
    assert [phase_at(s, state, 100, CONFIG) for s in (10, 79, 80)] == [
        "alternating",
        "alternating",
        "final dense",
    ]
    assert phase_at(50, initial(1, CONFIG), 100, CONFIG) == "dense"


def test_nothing_is_regrouped_in_the_last_phase() -> None:
    state = alternating(True)
    assert decide(80, state, [measured(0.1, 0.9, in_use=0.0)], 100, CONFIG).regroup == (False,)


def test_the_dense_schedule_never_switches() -> None:
    config = dataclasses.replace(CONFIG, schedule="dense")
    decision = decide(50, initial(1, CONFIG), [measured(0.01, 1.0)], 100, config)
    assert decision.state == initial(1, CONFIG)
    assert mode_at(50, decision.state, 100, config) == "dense"


def test_a_static_schedule_is_sparse_ever_after_and_its_structure_stands() -> None:
    config = dataclasses.replace(CONFIG, schedule="static")
    joined = decide(10, initial(2, config), [measured(0.4, 0.9), measured(0.1, 0.9)], 100, config)
    assert joined.regroup == (True, True)
    state = joined.state
    assert state == alternating(False, True)
    assert [mode_at(s, state, 100, config) for s in (9, 10, 50, 99)] == [
        "dense",
        "sparse",
        "sparse",
        "sparse",
    ]
    assert phase_at(99, state, 100, config) == "sparse"
    later = decide(90, state, [measured(0.1, 0.9), measured(0.9, 0.0, in_use=0.0)], 100, config)
    assert later.state.takes_part == (True, True)  # the second stays whatever is measured
    assert later.regroup == (True, False)


def test_a_sparse_schedule_is_sparse_from_the_first_step() -> None:
    config = dataclasses.replace(CONFIG, schedule="sparse")
    state = initial(2, config)
    assert {mode_at(s, state, 100, config) for s in range(100)} == {"sparse"}
    decision = decide(50, state, [measured(0.9, 0.0, in_use=0.0)] * 2, 100, config)
    assert (decision.state, decision.regroup) == (state, (False, False))


def test_layers_that_join_together_go_by_their_means() -> None:
    config = dataclasses.replace(CONFIG, join="together")
    start = initial(2, config)
    almost = [measured(0.5, 0.9), measured(0.2, 0.9)]  # mean activation ratio 0.35 > 0.3
    assert decide(10, start, almost, 100, config).state == start
    unstable = [measured(0.1, 0.9), measured(0.1, 0.0)]  # mean similarity 0.45 < 0.5
    assert decide(10, start, unstable, 100, config).state == start
    passing = [measured(0.5, 0.9), measured(0.1, 0.1)]
    assert decide(9, start, passing, 100, config).state == start
    state = decide(10, start, passing, 100, config).state
    assert state == alternating(True, True)
    assert decide(20, state, [measured(0.9, 0.0)] * 2, 100, config).state == state  # none leaves


def test_regrouping_at_switches_only() -> None:
    config = dataclasses.replace(CONFIG, regroup="switch")
    state = alternating(True)  # sparse 10 11 12, dense 13, sparse 14 ...
    assert [s for s in range(1, 20) if enters_sparse(s, state, 100, config)] == [10, 14, 18]
    for step, expected in ((13, False), (14, True), (15, False)):
        for in_use in (0.0, 1.0):
            found = decide(step, state, [measured(0.1, 0.9, in_use=in_use)], 100, config).regroup
            assert found == (expected,), step


def test_measurements_thin_out_as_the_run_grows() -> None:
    def measured_at(growth: float, last: int) -> list[int]:
        config = dataclasses.replace(CONFIG, monitor_every=5, monitor_growth=growth)
        return [step for step in range(1, last + 1) if is_measured(step, 1000, config)]

    assert not any(is_measured(100, 1000 + 10 * late, CONFIG) for late in range(1, 5))  # shortly before
    often = dataclasses.replace(CONFIG, min_dense_fraction=0.8, monitor_every=10)
    # 800 of 1,000 steps, less a tenth: none between 720 and 800
    assert [step for step in range(700, 831) if is_measured(step, 1000, often)] == [
        700,
        710,
        720,
        800,
        810,
        820,
        830,
    ]
    assert is_measured(103, 1030, CONFIG)  # where the first dense phase may end
    assert not is_measured(103, 1030, dataclasses.replace(CONFIG, schedule="dense"))
    assert measured_at(1.0, 22) == [5, 10, 15, 20]
    assert measured_at(2.0, 90) == [5, 10, 20, 40, 80]
    assert measured_at(1.5, 90) == [5, 10, 15, 25, 40, 60, 90]  # 1 2 3 5 8 12 18
    assert measured_at(1.1, 85) == [*range(5, 60, 5), 65, 75, 85]  # ... 9 10 11, then 13 15 17
    never = dataclasses.replace(CONFIG, monitor_every=0, schedule="dense")
    assert not any(is_measured(step, 1000, never) for step in range(1, 9))


def test_groupings_from_scratch_are_tried_only_where_they_matter() -> None:
    nobody_asks = dataclasses.replace(
        CONFIG, min_dense_fraction=0.8, monitor_every=50, stability_threshold=0.0, regroup_below=0.0
    )
    measured = [step for step in range(1, 1001) if is_measured(step, 1000, nobody_asks)]
    assert measured == [*range(50, 750, 50), 800, 850, 900, 950, 1000]
    # The structure found after 700 steps is the one with which layers join after 800.
    everyone, one_waits = alternating(True, True), alternating(True, False)
    assert [step for step in measured if groups_afresh(step, everyone, 1000, nobody_asks)] == [700]
    waiting = [step for step in measured if groups_afresh(step, one_waits, 1000, nobody_asks)]
    assert waiting == [700, 850, 900, 950, 1000]  # a layer that joins late gets a structure as good
    for config in (
        dataclasses.replace(nobody_asks, stability_threshold=0.1),
        dataclasses.replace(nobody_asks, regroup_below=0.1),
        dataclasses.replace(nobody_asks, regroup="switch"),
        dataclasses.replace(nobody_asks, router="weight_mean"),
    ):
        assert all(groups_afresh(step, everyone, 1000, config) for step in measured), config


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="monitor_every=0 with schedule=ssd would never find a layer"):
        SwitchConfig(monitor_every=0)
    assert SwitchConfig(monitor_every=0, schedule="dense").monitor_every == 0
    for wrong in (0.9, 11.0):
        with pytest.raises(
            InputError, match=f"monitor_growth={wrong} is out of range; use a number from 1 to 10"
        ):
            SwitchConfig(monitor_growth=wrong)
    with pytest.raises(
        InputError, match="gate=softmax with schedule=ssd would train two different functions"
    ):
        SwitchConfig(gate="softmax")
    with pytest.raises(InputError, match=r"load_balance=-0.1 is out of range"):
        SwitchConfig(load_balance=-0.1)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"min_dense_fraction=1.5 is out of range; use a number from 0 to 1"):
        SwitchConfig(min_dense_fraction=1.5)
    with pytest.raises(InputError, match=r"mass_target=1.0 is out of range; use a number between 0 and 1"):
        SwitchConfig(mass_target=1.0)
    with pytest.raises(InputError, match="sparse_steps=0 is out of range"):
        SwitchConfig(sparse_steps=0)
