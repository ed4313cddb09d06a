"""Recipe `auto` by hand: what a layer does follows from what each way to multiply costs, and from what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from train.test_loop import small, weights

from switchable import Controller, SwitchConfig
from switchable.compute.measured import Costs, Line
from switchable.config import RunConfig
from switchable.files import read_records
from switchable.settings import settled
from switchable.study.canvas import draw_picture
from switchable.study.pictures import pictures_of
from switchable.study.report import write_run_report
from switchable.study.study import records_of_run
from switchable.switching import controller, costs
from switchable.switching.costs import costs_of_layers, from_plain, plain
from switchable.switching.monitor import LayerMeasures
from switchable.switching.schedule import Schedule
from switchable.switching.state import ScheduleState
from switchable.train.pretrain import pretrain, resume

FULL_PRICE = Costs(1024, 0.004, None, Line(0.0, 0.004))
"""Neurons cannot be left out, and sparse steps cost their share, as on a GPU: 1 ms with a quarter of the experts."""
ACTIVE = Costs(1024, 0.004, Line(0.0005, 0.01), Line(0.0, 0.004))
"""Multiplying active neurons takes 1 ms where 5 % are active, and as long as dense with 35 %."""


def auto(of_layers: Sequence[Costs], **given: Any) -> Schedule:
    """The schedule of a thousand steps of a model with 1,024 neurons per layer."""
    schedule = Schedule(
        settled(SwitchConfig("auto", **({"activation_l1": 0.0} | given)), 1024, "relu2"), 1000
    )
    schedule.costs = tuple(of_layers)
    return schedule


def layer(ratio: float, k: int = 32, alike: float = 0.5) -> LayerMeasures:
    """A layer that needs k of 128 experts for the mass asked for."""
    by_k = (0.0,) * (k - 1) + (1.0,) * (129 - k)
    return LayerMeasures(ratio, 0.9, by_k, by_k, 0.95, 1.5, experts_per_token=k, pattern_similarity=alike)


def ways(schedule: Schedule, measures: Sequence[LayerMeasures]) -> dict[int, tuple[str, ...]]:
    """What layers do from each measurement on that changed it, if the same is measured all the time."""
    state, found = schedule.initial(len(measures)), {}
    for step in range(1, schedule.total_steps + 1):
        if schedule.is_measured(step, state):
            before, state = state, schedule.decide(step, state, measures).state
            found |= {step: state.ways} if state.ways != before.ways else {}
    return found


def test_early_and_late_are_what_auto_comes_to() -> None:
    measures = [layer(0.05), layer(0.05)]
    early = settled(SwitchConfig("late", min_dense_fraction=0.1), 1024, "relu2")
    assert ways(auto([FULL_PRICE] * 2), measures) == {100: ("sparse", "sparse")}
    assert ways(Schedule(early, 1000), measures) == {50: ("active", "active"), 100: ("sparse", "sparse")}
    assert ways(auto([ACTIVE] * 2), measures) == {50: ("active", "active"), 920: ("sparse", "sparse")}
    late = Schedule(settled(SwitchConfig("late"), 1024, "relu2"), 1000)
    assert ways(late, measures) == {50: ("active", "active"), 920: ("sparse", "sparse")}


def test_each_layer_by_its_own_costs() -> None:
    # From 25 % active neurons, 3 ms; with 32 experts 1 ms; with 80 of them 2.5 ms, 1.2 times as fast: too little.
    measures = [layer(0.25), layer(0.05), layer(0.25, k=80), layer(0.4), layer(0.05, k=90)]
    found = ways(auto([ACTIVE] * 5), measures)
    assert found == {
        50: ("active", "active", "active", "dense", "active"),
        100: ("sparse", "active", "active", "dense", "active"),  # 4 ms or 1 ms, but 40 % are active
        920: ("sparse", "sparse", "sparse", "sparse", "active"),  # 90 of 128 are more than 0.65
    }
    assert ways(auto([FULL_PRICE, ACTIVE]), [layer(0.05)] * 2)[100] == ("sparse", "active")


def test_a_limit_that_is_given_stands() -> None:
    found = ways(auto([ACTIVE] * 2, active_below=0.1), [layer(0.05, k=90), layer(0.15, k=90)])
    assert found == {50: ("active", "dense")}
    assert ways(auto([FULL_PRICE], min_dense_fraction=1.0), [layer(0.05)]) == {}
    assert ways(auto([FULL_PRICE], min_dense_fraction=0.05), [layer(0.05)]) == {50: ("sparse",)}


def test_a_layer_joins_early_when_it_saves_clearly_and_leaves_when_it_no_longer_does() -> None:
    schedule = auto([ACTIVE])
    start = schedule.initial(1)

    def joins(ratio: float, state: ScheduleState = start, step: int = 200, alike: float = 0.5) -> bool:
        return schedule.decide(step, state, [layer(ratio, 32, alike)]).state.takes_part[0]

    # With 32 of 128 experts 1 ms: 1.5 times that are 10 % active neurons, 1.2 times 7 %.
    assert (joins(0.101), joins(0.099)) == (True, False)
    inside = schedule.decide(200, start, [layer(0.2)]).state
    assert inside.gains == (2.5,)
    assert (joins(0.071, inside), joins(0.069, inside)) == (True, False)
    assert (joins(0.2, alike=0.15), joins(0.2, alike=0.149)) == (True, False)
    assert not joins(0.2, step=99)
    # However cheap: more than 30 % active neurons keep it out, more than 37.5 % put it out.
    assert (joins(0.3), joins(0.301), joins(0.37, inside), joins(0.38, inside)) == (True, False, True, False)
    # A layer whose activations are penalised in dense steps is left to them: down to 12 %, and it leaves above 15 %.
    schedule = auto([ACTIVE], activation_l1=1e-4)
    assert (joins(0.12), joins(0.121), joins(0.15, inside), joins(0.151, inside)) == (
        True,
        False,
        True,
        False,
    )
    assert schedule.decide(200, start, [layer(0.2)]).state.why_dense == (
        "at step 200: activation ratio 0.200, above what is penalised: 0.12",
    )
    schedule = auto([ACTIVE])
    # From 920 on sparse mode is taught, whatever it costs and however the pattern moves.
    assert joins(0.01, step=920, alike=0.0)
    assert joins(0.01, inside, step=920, alike=0.0)


def test_the_reasons_are_the_numbers_compared() -> None:
    schedule = auto([ACTIVE, FULL_PRICE])
    decision = schedule.decide(200, schedule.initial(2), [layer(0.08), layer(0.25)])
    active, sparse = decision.changes
    assert (active.layer, active.before, active.now) == (0, "dense", "active")
    assert active.why == "dense 4 ms, active 1.3 ms, sparse 1 ms; 0.080 of the neurons active"
    assert (sparse.layer, sparse.before, sparse.now) == (1, "dense", "sparse")
    assert sparse.why == (
        "dense 4 ms, sparse 1 ms; 0.250 of the neurons active, 32 of 128 experts, pattern similarity 0.500"
    )
    assert decision.state.why_dense == (
        "at step 200: a dense step takes 1.30 times a sparse one, below 1.5",
        "",
    )
    (left,) = schedule.decide(300, decision.state, [layer(0.08), layer(0.25, k=110)]).changes
    assert (left.before, left.now) == ("sparse", "dense")
    assert left.why == (
        "dense 4 ms, sparse 3.44 ms; 0.250 of the neurons active; mass_target=0.93 takes 0.86 of its experts, above "
        "0.33, a dense step takes 1.16 times a sparse one, below 1.5"
    )
    (taught,) = schedule.decide(920, decision.state, [layer(0.08, alike=0.2), layer(0.25)]).changes
    assert taught.why.endswith("pattern similarity 0.200; from step 920 on sparse mode is taught")
    late = Schedule(settled(SwitchConfig("late"), 1024, "relu2"), 1000)
    (named,) = late.decide(50, late.initial(1), [layer(0.08)]).changes
    assert named.why == "0.080 of the neurons active, active_below=0.3"


def test_structures_are_found_from_scratch_where_a_layer_is_about_to_join() -> None:
    schedule = auto([FULL_PRICE] * 2)
    start = schedule.initial(2)
    assert [schedule.groups_afresh(step, start) for step in (50, 300)] == [False, False]

    def fresh(*gains: float) -> list[int]:
        state = ScheduleState((False,) * 2, (32,) * 2, (False,) * 2, (0.0,) * 2, gains=gains)
        due = [step for step in range(1, 1001) if schedule.is_measured(step, state)]
        return [step for step in due if schedule.groups_afresh(step, state)]

    assert fresh(1.0, 1.19) == [750, 1000]  # the last before 920, and for a layer that has yet to join
    assert fresh(1.0, 1.21) == [50, 100, 150, 200, 300, 400, 550, 750, 920, 1000]


def test_costs_of_a_models_own_layers(switchable_gpt2: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(costs, "costs", lambda *given: (asked.append(given), FULL_PRICE)[1])
    layers = Controller(switchable_gpt2, torch.zeros(1, 8, dtype=torch.long), 5).layers
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    found = costs_of_layers(layers, 700, half)
    assert from_plain(json.loads(json.dumps(plain((*found, ACTIVE))))) == (FULL_PRICE, FULL_PRICE, ACTIVE)
    (ffn, experts, precision, _), again = asked
    assert (ffn[:6], experts, precision) == ((16, 64, "relu", False, 700, "cpu"), 8, "bfloat16")
    assert again == asked[0]
    asked.clear()
    costs_of_layers(layers, 100, torch.enable_grad)
    assert asked[0][2:] == ("float32", False)  # too few tokens to leave out neurons


def test_any_loop_times_its_layers_at_its_first_step(
    make_gpt2: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switchable import convert

    model = make_gpt2("relu2")
    convert(model, SwitchConfig("auto", monitor_every=2, stability_threshold=0.0))
    loop = Controller(model, tokens, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert loop.schedule.costs == ()
    loop.step(optimizer)
    first = loop.schedule.costs
    assert len(first) == 2
    assert all(each.dense > 0 < each.sparse.at(0.5) for each in first)
    monkeypatch.setattr(controller, "costs_of_layers", None)  # once is enough, also where a run goes on
    loop.step(optimizer)
    again = Controller(model, tokens, total_steps=10)
    again.load_state_dict(
        json.loads(json.dumps({**loop.state_dict(), "last": [], "patterns": [], "routes": []}))
    )
    assert (again.schedule.costs, again.state) == (first, loop.state)
    again.last = loop.last
    again.step(optimizer)


def auto_run(corpus: Path) -> RunConfig:
    own = {"mass_target": None, "active_below": 1.0, "min_dense_fraction": 0.8, "final_dense_fraction": 0.0}
    own |= {"activation_l1": 0.0}  # many neurons of so young a model are active, and must not keep it out
    return small(corpus, train={"batch_size": 32}, switch={"recipe": "auto", **own})


def set_clock(monkeypatch: pytest.MonkeyPatch, *of_layers: Costs) -> None:
    monkeypatch.setattr(controller, "costs_of_layers", lambda *_: of_layers)


def test_a_run_goes_on_by_the_costs_it_began_with(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, FULL_PRICE, ACTIVE._replace(active=Line(0.001, 0.0)))
    config = auto_run(corpus)
    pretrain(config, tmp_path / "whole", tmp_path / "cache", quiet=True)
    pretrain(config, tmp_path / "parts", tmp_path / "cache", quiet=True)
    set_clock(monkeypatch, ACTIVE, FULL_PRICE)  # another machine
    resume(tmp_path / "parts", {}, tmp_path / "cache", "step-000010", quiet=True)
    ends = [weights(tmp_path / run / "checkpoints/step-000020") for run in ("whole", "parts")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    kept = [read_records(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    clocks = ("tokens_per_second", "train_seconds", "cpu_seconds")
    same = [[{k: v for k, v in r.items() if k not in clocks} for r in records] for records in kept]
    assert same[0] == same[1]


def test_metrics_and_report_say_what_every_layer_did_at_every_step_and_why(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_clock(monkeypatch, ACTIVE._replace(active=Line(0.004, 0.0)), ACTIVE._replace(active=Line(0.001, 0.0)))
    pretrain(auto_run(corpus), tmp_path / "run", tmp_path / "cache")
    said = capsys.readouterr().err
    assert (
        "recipe auto: from step 16 on at the earliest 2 sparse steps to each dense one; already from step 2 on in "
        "layers where that is clearly cheaper here, experts chosen by products in 8 bits, in the "
        "last steps by the router; changed: "
    ) in said
    assert (
        "an FFN on 1024 tokens takes here, forward and backward: dense 4 ms, active 4 ms, sparse 0.5 ms with 5% of the "
        "neurons active or 1/8 of the experts; dense 4 ms, active 4 ms, sparse 2 ms with 25% of the neurons active or "
        "1/2 of the experts"
    ) in said
    records = read_records(tmp_path / "run/metrics.jsonl")
    assert records[0]["kind"] == "costs"
    assert from_plain(records[0]["layers"])[0] == ACTIVE._replace(active=Line(0.004, 0.0))
    train = [r for r in records if r["kind"] == "train"]
    steps = ["".join(r["step_ways"][i] for r in train) for i in (0, 1)]
    # Measured every third step. The first layer joins after 3: two sparse steps, one dense. The other, whose
    # active neurons make it cheap, is taught after 16, in the order that the first has begun.
    assert steps == ["ddd" + "ssd" * 5 + "ss", "ddd" + "a" * 13 + "sass"]
    names = {"d": "dense", "a": "active", "s": "sparse"}
    for record in records[1:]:
        assert record["layer_ways"] == [names[each[record["step"] - 1]] for each in steps], record
    changes = [(r["step"], r["layer"], r["from"], r["to"]) for r in records if r["kind"] == "change"]
    assert changes == [(3, 0, "dense", "sparse"), (3, 1, "dense", "active"), (16, 1, "active", "sparse")]
    why = {(r["step"], r["layer"]): r["why"] for r in records if r["kind"] == "change"}
    assert all(told.startswith("dense 4 ms, active ") for told in why.values())
    study = records_of_run(tmp_path / "run")
    assert study.span[0] == 3  # the clock's line is no step
    (picture,) = [each for each in pictures_of(study) if each.name == "ways"]
    told = [text for *_, text in draw_picture(picture.draws).points]
    assert told[0] == "layer 0, steps 1 to 4: 1 sparse, 3 dense"
    assert told[-1] == "layer 1, steps 17 to 20: 3 sparse, 1 active"
    page = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "What layers changed, and why" in page
    assert f"<td>16<td>1<td>active<td>sparse<td>{why[16, 1]}" in page
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert [(p.step, p.value) for p in board.Scalars("sparse_steps/layer 1")][-2:] == [(16, 0.0), (20, 0.75)]
