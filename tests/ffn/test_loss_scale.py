"""Routers and penalties follow what the loop makes of the loss: halves of a batch, a scale, a Trainer's division."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import Controller, SwitchConfig, convert, set_mode
from switchable.ffn import active_training
from switchable.ffn.convert import layers_of

IDS = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(1))
Loop = Callable[[nn.Module], None]


def loss(model: nn.Module, ids: Tensor = IDS, **more: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids, **more).loss
    return found


def gradients(loop: Loop, mode: str = "dense", *, compiled: bool = False) -> dict[str, Tensor]:
    """What a loop's backward passes leave of a float64 model whose activations are penalised."""
    model = tiny_gpt2(dtype=torch.float64)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3, activation_l1=1e-2))
    Controller(model, IDS, total_steps=10)
    layers_of(model)[0].ssd.loss_scale.routers = 1.0
    for layer in layers_of(model):
        layer.ssd.takes_part = True
    set_mode(model, mode)
    if compiled:
        for block in model.transformer.h:  # type: ignore[union-attr]
            block.compile(backend="aot_eager")
    loop(model.train())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(model: nn.Module) -> None:
    loss(model).backward()


def halves(model: nn.Module) -> None:
    for ids in IDS.chunk(2):
        (loss(model, ids) / 2).backward()


def halves_at_once(model: nn.Module) -> None:
    first, second = (loss(model, ids) for ids in IDS.chunk(2))
    (0.5 * first + second / 2).backward()


def looked_at_in_between(model: nn.Module) -> None:
    found = loss(model)
    with torch.no_grad():
        model(input_ids=IDS[:1])
    found.backward()


def scaled(model: nn.Module) -> None:
    (1024 * loss(model)).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 1024


def recomputed(model: Any) -> None:
    model.activation_checkpointing_enable()
    halves(model)


def divided_inside(model: nn.Module) -> None:
    """As transformers' Trainer has it: the model divides by what all micro-batches predict."""
    for ids in IDS.chunk(2):
        loss(model, ids, num_items_in_batch=torch.tensor(4 * 24)).backward()


def as_a_tuple(model: nn.Module) -> None:
    for ids in IDS.chunk(2):
        (model(input_ids=ids, labels=ids, return_dict=False)[0] / 2).backward()


def computed_outside(model: nn.Module) -> None:
    layers_of(model)[0].ssd.loss_scale.unseen = 0.5
    for ids in IDS.chunk(2):
        logits = model(input_ids=ids).logits[:, :-1]
        (nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / 2).backward()


LOOPS: list[Loop] = [
    halves, halves_at_once, looked_at_in_between, scaled, recomputed, as_a_tuple, computed_outside,
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("mode", ["dense", "active", "sparse"])
def test_whatever_the_loop_makes_of_the_loss(loop: Loop, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_training, "LEAST_TOKENS", 8)

    def prepared(loop: Loop) -> Loop:
        def run(model: nn.Module) -> None:
            for layer in layers_of(model):
                layer.ssd.multiplies_active = mode == "active"
            loop(model)

        return run

    expected, found = (
        gradients(prepared(each), "sparse" if mode == "sparse" else "dense") for each in (whole, loop)
    )
    assert expected.keys() == found.keys()
    assert any("router" in name for name in expected)
    for name, gradient in expected.items():
        # transformers' loss, and what a router learns from, are float32.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_divided_inside_the_model() -> None:
    expected, found = gradients(whole), gradients(divided_inside)
    for name in (name for name in expected if "router" in name):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own insides
def test_compiled_blocks_read_the_factor_too() -> None:
    expected, found = gradients(whole), gradients(halves, compiled=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_loop_that_clips_by_the_norm_of_all_gradients_hardly_feels_the_routers(mode: str) -> None:
    model = tiny_gpt2(dtype=torch.float64)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    set_mode(model.train(), mode)
    routers = {name: p for name, p in model.named_parameters() if ".router." in name}
    others = [p for name, p in model.named_parameters() if name not in routers]
    scale, norms, kept = layers_of(model)[0].ssd.loss_scale, {}, {}
    for part in (1.0, scale.routers):
        scale.routers = part
        model.zero_grad(set_to_none=True)
        loss(model).backward()
        kept[part] = {name: p.grad.clone() for name, p in routers.items() if p.grad is not None}
        without = nn.utils.get_total_norm([p.grad for p in others if p.grad is not None])
        norms[part] = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1) / without)
    assert norms[1.0] > 1.05
    assert 1 < norms[1 / 32] < 1.001
    assert kept[1.0].keys() == routers.keys()
    for name, gradient in kept[1.0].items():
        assert torch.equal(kept[1 / 32][name], gradient / 32)


@pytest.mark.parametrize("case", ["outside", "inside", "without a penalty", "whole", "told"])
def test_a_loop_that_accumulates_a_loss_of_its_own_is_told_of_its_factor(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt2("relu2")
    convert(model, SwitchConfig(num_experts=8, activation_l1=0.0 if case == "without a penalty" else 1e-4))
    controller = Controller(model.train(), IDS, total_steps=10)
    if case == "told":
        layers_of(model)[0].ssd.loss_scale.unseen = 0.5
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        for ids in [IDS] if case == "whole" else IDS.chunk(2):
            if case == "inside":
                found = loss(model, ids)
            else:
                logits = model(input_ids=ids).logits[:, :-1]
                found = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            (found / 2).backward()
        optimizer.step()
        controller.step(optimizer)
    said = [record.getMessage() for record in caplog.records if "outside the model" in record.getMessage()]
    assert len(said) == (case == "outside")
    assert all("loss of 2 forward passes" in each and "unseen = 1 / 2" in each for each in said)


@pytest.mark.parametrize("case", ["evaluation", "training", "both", "no forward pass"])
def test_a_loop_in_evaluation_mode_is_told_that_routers_do_not_learn(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt2()
    convert(model, SwitchConfig(num_experts=8))
    controller = Controller(model, IDS, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters())
    for training in {"evaluation": [False], "training": [True], "both": [False, True]}.get(case, []):
        loss(model.train(training)).backward()
    optimizer.step()
    controller.step(optimizer)
    loss(model.eval()).backward()
    controller.step(optimizer)
    said = [record.getMessage() for record in caplog.records if "evaluation mode" in record.getMessage()]
    assert len(said) == (case == "evaluation")
    assert all(each.endswith("call model.train()") for each in said)


def test_a_copy_watches_its_own_loss(switchable_gpt2: nn.Module) -> None:
    twin = copy.deepcopy(switchable_gpt2).train()
    (3 * loss(twin)).backward()
    assert float(layers_of(twin)[1].ssd.loss_scale.now) == 3.0
    assert float(layers_of(switchable_gpt2)[1].ssd.loss_scale.now) == 1.0
