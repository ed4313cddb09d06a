"""What `auto` stands for: by the clock, once, with its reason; by hand where the clock is set by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_run

from switchable import choices
from switchable.choices import auto_precision, costs_of
from switchable.cli import main
from switchable.compute import measured
from switchable.compute.measured import (
    FFN,
    Costs,
    Line,
    active_break_even,
    bfloat16_speedup,
    costs,
    line_through,
    sparse_speedup,
)
from switchable.config import RunConfig, from_dict, load, read_stored, to_dict
from switchable.sections import ModelConfig, TrainConfig
from switchable.settings import SwitchConfig, settled
from switchable.timing import Times
from switchable.train.pretrain import pretrain, resume

MODEL = ModelConfig(d_model=16)
CPU = TrainConfig(device="cpu", threads=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set by hand what was measured: the speed-up of bfloat16, the break-even of active; and if it has loops."""

    def set_to(half: float = 2.0, active: float = 0.3, loops: bool = True) -> None:
        monkeypatch.setattr(choices, "bfloat16_speedup", lambda *_: half)
        monkeypatch.setattr(choices, "active_break_even", lambda *_: active)
        monkeypatch.setattr(choices, "skips_idle_neurons", lambda *_: loops)

    return set_to


@pytest.mark.parametrize(
    ("half", "name"), [(3.0, "bfloat16"), (1.2, "bfloat16"), (1.19, "float32"), (0.4, "float32")]
)
def test_precision_auto_is_bfloat16_where_it_is_clearly_faster(clock: Any, half: float, name: str) -> None:
    clock(half=half)
    found, why = auto_precision(MODEL, CPU)
    assert (found, f"{half:.2f} times as fast in bfloat16 as in float32" in why) == (name, True)
    config = load(None, {"d_model": 16, "device": "cpu"})
    assert config.train.precision == name
    assert from_dict(to_dict(config)) == config  # written down and read again
    assert load(None, {"precision": "float32", "device": "cpu"}).train.precision == "float32"
    assert RunConfig().train.precision == "float32"  # in code, what is not given is not measured


def test_a_run_for_a_device_that_is_not_here_is_planned_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load(None, {"device": "cuda"})
    assert (config.train.precision, config.switch.recipe) == ("bfloat16", "auto")
    # Its FLOPs: a router of 128 rows beside 2 x 3 products of 1,024 neurons, whose experts have 32 at least.
    found = costs_of(config.model, config.train, config.switch.num_experts)
    assert found == Costs(2048, 1.0, None, Line(32 / (6 * 1024), 1.0))


def test_an_ffn_that_would_take_minutes_is_not_timed() -> None:
    config = load(
        None, {"d_model": 32_768, "num_layers": 1, "device": "cpu"}
    )  # 2 * 4 * 32,768^2 = 2^33 weights
    assert config.train.precision == "float32"
    assert "more than 536,870,912 weights, is not timed" in auto_precision(config.model, config.train)[1]


@pytest.mark.parametrize(
    ("precision", "recipe", "active", "limit"),
    [
        ("float32", "late", 0.0, 0.3),  # the recipe's limit is float32's
        ("float32", "early", 0.0, 0.2),
        ("bfloat16", "late", 0.17, 0.15),
        ("bfloat16", "late", 0.9, 0.3),
        ("bfloat16", "late", 0.04, 0.0),
        ("bfloat16", "auto", 0.04, 1.0),  # what a run measures decides in it
    ],
)
def test_idle_neurons_are_left_out_where_that_pays(
    clock: Any, precision: str, recipe: str, active: float, limit: float
) -> None:
    clock(active=active)
    switch = load(None, {"precision": precision, "device": "cpu", "recipe": recipe}).switch
    assert (switch.recipe, switch.active_below) == (recipe, limit)


def test_what_is_asked_for_by_name_stands(clock: Any) -> None:
    clock(half=0.1, active=0.0)
    switch = load(None, {"precision": "bfloat16", "recipe": "early", "active_below": 0.2}).switch
    assert (switch.recipe, switch.active_below, switch.min_dense_fraction) == ("early", 0.2, 0.1)


@pytest.mark.parametrize(
    ("precision", "device", "amx", "experts", "chosen"),
    [
        ("float32", "cpu", True, 128, 21),  # groups of 8
        ("bfloat16", "cpu", False, 128, 21),
        ("bfloat16", "cpu", True, 32, 5),
        ("bfloat16", "cuda", False, 32, 5),
    ],
)
def test_groups_are_of_32_neurons_or_more_where_bfloat16_is_multiplied_by_tiles(
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    device: str,
    amx: bool,
    experts: int,
    chosen: int,
) -> None:
    clock()
    monkeypatch.setattr(choices, "has_tiles", lambda: amx)
    values = {"precision": precision, "device": device, "recipe": "auto", "d_model": 256}
    switch = load(None, values).switch
    assert (switch.num_experts, switch.experts_per_token) == (experts, chosen)
    assert load(None, values | {"num_experts": 64}).switch.experts_per_token == 10


def test_large_groups_keep_their_share_of_the_experts() -> None:
    for d_ff, experts in {1024: (32, 5), 3072: (96, 15), 8192: (128, 21), 16: (1, 1)}.items():
        found = settled(SwitchConfig("late"), d_ff, "relu2", least_neurons=32)
        assert (found.num_experts, found.experts_per_token) == experts


def test_the_break_even_is_on_a_line_through_two_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {0.05: 0.5, 0.25: 1.5}  # of `active`; dense takes one

    def timed(*arguments: Any) -> Times:
        return Times({"dense": [1.0], "active": [seconds[arguments[3]]]})

    monkeypatch.setattr(measured, "_timed", timed)
    assert active_break_even(FFN(1, 1, "relu", False, 1, "cpu"), "bfloat16") == pytest.approx(0.15)
    seconds[0.05] = 1.0
    assert active_break_even(FFN(1, 2, "relu", False, 1, "cpu"), "bfloat16") == 0.0
    seconds |= {0.05: 0.5, 0.25: 0.5}
    assert active_break_even(FFN(1, 3, "relu", False, 1, "cpu"), "bfloat16") == 1.0


def test_costs_are_lines_through_two_points(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def timed(_: FFN, ways: Any, precision: str, share: float) -> Times:
        asked.append((sorted(ways), precision, share))
        # The machine is twice as slow the second time: ratios count.
        slow = 1.0 if share == 0.05 else 2.0
        found = {"dense": slow * 4.0, "sparse": slow * (1.0 if slow == 1 else 2.5), "active": slow * 0.5}
        return Times({name: [seconds] for name, seconds in found.items()})

    monkeypatch.setattr(measured, "_timed", timed)
    # 4 and 16 of 32 experts take 1 and 2.5 of dense's 4 seconds: 0.5 + 4 K/E; active neurons always 0.5.
    found = costs(FFN(1, 1, "relu", False, 5000, "cpu"), 32, "bfloat16", True)
    assert found == Costs(1024, 4.0, Line(0.5, 0.0), Line(0.5, 4.0))
    assert asked == [(["active", "sparse"], "bfloat16", 0.05), (["active", "sparse"], "bfloat16", 0.25)]
    assert found.gain(0.1, 0.125) == 0.5
    assert found.told(0.1, 0.125) == "dense 4e+03 ms, active 500 ms, sparse 1e+03 ms"
    none = costs(FFN(1, 2, "relu", False, 70, "cpu"), 1, "float32", False)  # one expert: no line
    assert none == Costs(70, 4.0, None, Line(1.0, 0.0))
    assert none.gain(0.0, 1.0) == 4.0


def test_a_line_never_falls_and_is_never_below_zero() -> None:
    assert line_through((0.25, 0.5), (2.0, 1.0)) == Line(2.0, 0.0)
    assert line_through((0.25, 0.5), (1.0, 3.0)) == Line(0.0, 4.0)


@pytest.mark.parametrize("gated", [False, True])
def test_the_clock_times_the_same_function_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    """With all experts on, the sparse way gives what the dense one does; bfloat16 is multiplied in bfloat16."""
    seen: dict[str, torch.Tensor] = {}

    def take_turns(contenders: Any, *_: Any, **__: Any) -> Times:
        for name, call in contenders.items():
            step, way = call.func, call.args[0]

            def noting(*given: Any, name: str = name, way: Any = way) -> torch.Tensor:
                seen[name] = way(*given)
                return seen[name]

            step(noting)
        return Times({name: [float(len(name))] for name in contenders})

    monkeypatch.setattr(measured, "take_turns", take_turns)
    ffn, state = FFN(16, 64, "relu2", gated, 70, "cpu", 1), torch.get_rng_state()
    assert sparse_speedup(ffn, 8, 8, "float32", gated) == 5 / 6  # len("dense") / len("sparse")
    torch.testing.assert_close(seen["sparse"], seen["dense"], rtol=1e-4, atol=1e-4)
    assert bfloat16_speedup(ffn) == 5 / 4
    assert (seen["dense"].dtype, seen["half"].dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(seen["half"].float(), seen["dense"], rtol=0.1, atol=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_does_as_its_start_chose_whatever_this_machine_would_choose(
    corpus: Path, tmp_path: Path, clock: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    clock(half=2.0)
    config = small_run(corpus, precision="auto", checkpoint_every=10)
    pretrain(config, tmp_path / "run", tmp_path / "cache")
    said = capsys.readouterr().err
    assert (
        "precision bfloat16: it is what precision auto is here (an FFN of this model, dense, is 2.00 times"
        in said
    )
    assert "experts and their choice by 8 bits are " in said
    assert "step 3: sparse steps begin in 2 layers: 3 of 8 experts" in said
    clock(half=0.5)
    left = {"precision": "auto", "recipe": "auto"}
    resume(tmp_path / "run", left, tmp_path / "cache", "step-000010")
    assert "auto" not in capsys.readouterr().err
    assert read_stored(tmp_path / "run/config.yaml") == config
    assert main(["pretrain", "--resume", "--out", str(tmp_path / "run"), "--precision", "float32"]) == 2
    assert "train.precision: 'bfloat16' -> 'float32'" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{}, {"precision": "bfloat16", "recipe": "early"}])
def test_nothing_is_measured_where_nothing_is_to_be_chosen(
    monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    monkeypatch.setattr(measured, "_timed", None)
    config = load(None, given, choose=False)
    assert (config.train.precision, config.switch.recipe) == (
        given.get("precision", "float32"), given.get("recipe", "auto"),
    )  # fmt: skip
    assert (
        from_dict({"train": {"precision": "bfloat16"}, "switch": {"active_below": 0.2}}).switch.active_below
        == 0.2
    )
