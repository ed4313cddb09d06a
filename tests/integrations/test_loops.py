"""Loops that others wrote: additions in place, compiled models, accelerate, schedule-free optimizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from integrations.loops import CONFIG, FAMILY, IDS, MODES, NanoGPT, Result, loop, trained_alone
from support import tiny_gpt2

from switchable import SwitchConfig, convert, set_mode
from switchable.compute.choose import BACKENDS


@pytest.fixture(scope="module")
def alone() -> Result:
    return trained_alone(torch.float32)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("backend", ["auto", *sorted(set(BACKENDS) - {"decode", "triton"})])
def test_models_may_add_in_place_to_what_an_ffn_returns(backend: str, mode: str) -> None:
    """As Falcon's parallel blocks do: output and gradients are those of an addition out of place."""
    found = []
    for in_place in (True, False):
        model = NanoGPT(in_place)
        convert(model, dataclasses.replace(CONFIG, backend=backend, activation_l1=1e-3), FAMILY)
        set_mode(model.train(), mode)
        y = model(IDS)
        y.square().mean().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_trains_as_an_uncompiled_one(alone: Result, whole: bool) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    call: Any = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.compile(backend="aot_eager")
    found = loop(call)
    assert found.modes == alone.modes
    torch.testing.assert_close(found.losses, alone.losses, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_each_layer_of_a_compiled_model_may_have_its_own_k() -> None:
    """The compiler gives up on what it has compiled for eight numbers, and says so."""
    model = tiny_gpt2(layers=10)
    convert(model, SwitchConfig(num_experts=16, experts_per_token=3))
    set_mode(model.train(), "sparse", experts_per_token=list(range(1, 11)))
    losses = {}
    for compiled in (False, True):
        call: Any = torch.compile(model, backend="aot_eager") if compiled else model
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            losses[compiled] = call(input_ids=IDS, labels=IDS, use_cache=False).loss
            losses[compiled].backward()
    torch.testing.assert_close(losses[True], losses[False])
    torch.compiler.reset()


def test_accelerate_trains_as_the_plain_loop(alone: Result) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_gpt2()
    convert(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    found = loop(prepared, optimizer=wrapped)
    assert found.modes == alone.modes
    assert found.losses == alone.losses


def test_what_wants_contiguous_parameters_gets_them_where_the_layout_gains_nothing() -> None:
    report = {}
    for recipe in ("dense", "early"):
        model = tiny_gpt2()
        report[recipe] = str(convert(model, SwitchConfig(num_experts=8, experts_per_token=3, recipe=recipe)))
        contiguous = all(p.is_contiguous() for p in model.parameters())
        assert contiguous == (recipe == "dense")
    assert report["dense"] == "2 of 2 FFNs are switchable: 8 experts of 8 neurons"
    assert report["early"].endswith("convert(..., neuron_major=False))")


def test_a_schedule_free_wrapper_needs_contiguous_parameters_and_then_follows() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    model = tiny_gpt2()
    convert(model, CONFIG, neuron_major=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = schedulefree.ScheduleFreeWrapper(sgd, momentum=0.9)
    wrapper.train()
    found = loop(model, optimizer=wrapper)
    assert found.modes == MODES
    assert found.moved > 0
