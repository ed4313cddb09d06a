"""The limits of early sparse steps by hand, where products in 8 bits choose the experts."""

from __future__ import annotations

import dataclasses

from switching.test_schedule import changed, measured


def test_early_a_layer_joins_by_what_products_in_8_bits_catch() -> None:
    schedule = changed(mass_target=0.9, num_experts=4, experts_per_token=2)
    for ratio, joins in ((0.3, True), (0.31, False)):
        two = dataclasses.replace(measured(ratio, 0.9), best_by_k=(0.89, 0.95, 1.0, 1.0))
        assert schedule.decide(10, schedule.initial(1), [two]).state.takes_part == (joins,)
    three = dataclasses.replace(measured(0.1, 0.9), best_by_k=(0.6, 0.89, 1.0, 1.0))
    assert schedule.decide(10, schedule.initial(1), [three]).state.why_dense == (
        "at step 10: mass_target=0.9 takes 0.75 of its experts, above 0.65",
    )


def test_early_a_token_trains_a_tenth_of_the_experts_at_least() -> None:
    schedule = changed(mass_target=0.9, num_experts=128, experts_per_token=21, final_dense_fraction=0.0)
    for enough, k in ((5, 12), (12, 12), (13, 13)):
        by_k = (0.0,) * (enough - 1) + (1.0,) * (129 - enough)
        few = dataclasses.replace(measured(0.1, 0.9), mass_by_k=by_k, best_by_k=by_k)
        decision = schedule.decide(10, schedule.initial(1), [few])
        assert decision.state.experts_per_token == (k,)
        assert f", {k} of 128 experts" in decision.changes[0].why
        # In the last 8 % the router chooses, and the mass decides alone.
        assert schedule.decide(92, decision.state, [few]).state.experts_per_token == (enough,)
