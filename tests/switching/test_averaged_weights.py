"""Averages of the weights follow every regrouping: models, state dicts and lists."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import tiny_gpt2
from switching.training import CONFIG, structures, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from switchable import InputError, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.switching.controller import Controller
from switchable.switching.copies import copied_tensors, twins
from switchable.switching.switch import regroup

COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "averaged model": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "state dict": lambda model: {n: p.detach().clone() for n, p in model.named_parameters()},
    "list": lambda model: [p.detach().clone() for p in model.parameters()],
}


@pytest.mark.parametrize("kind", COPIES)
def test_an_average_of_the_weights_follows_every_regrouping(tokens: Tensor, kind: str) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    average = COPIES[kind](model)
    wanted = structures(model)
    layers = layers_of(model)
    own = [layer.ssd.weights.up_FD.detach().clone() for layer in layers]
    perms = regroup(layers, wanted, (), copied_tensors(model, [average]), twins(layers, [average]))
    for i, perm in enumerate(perms):
        assert perm is not None
        name = f"transformer.h.{i}.mlp.c_fc.weight"
        tensors = average if kind == "state dict" else None
        if kind == "list":
            tensors = dict(zip(dict(model.named_parameters()), average, strict=True))
        theirs = (
            dict(average.module.named_parameters())[name] if tensors is None else tensors[name]
        ).detach()
        assert torch.equal(theirs.T, own[i][perm])
    if kind == "averaged model":
        torch.testing.assert_close(average(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_an_average_stays_the_same_model_through_training_with_regroupings(tokens: Tensor) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    controller = Controller(model, tokens, total_steps=40, config=CONFIG, copies=[average])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    moved = 0
    for _ in range(6):
        train(model, [optimizer], tokens, 1)
        average.update_parameters(model)
        before = average(input_ids=tokens).logits
        measurement = controller.step(optimizer)
        torch.testing.assert_close(average(input_ids=tokens).logits, before, rtol=1e-4, atol=1e-5)
        assert measurement is not None
        moved += sum(perm is not None for perm in measurement.permutations)
        assert [t.ssd.experts_per_token for t in layers_of(average)] == [
            layer.ssd.experts_per_token for layer in layers_of(model)
        ]
    assert moved > 0


@pytest.mark.parametrize("what", ["all tensors", "floats"])
def test_a_state_dict_that_is_averaged_stays_a_switchable_model(tokens: Tensor, what: str) -> None:
    model = tiny_gpt2()
    convert(model, CONFIG)
    average = copy.deepcopy(model.state_dict())
    config = replace(CONFIG, max_activation_ratio=1.0, min_mass_caught=0.0, min_dense_fraction=0.05)
    controller = Controller(model, tokens, total_steps=40, config=config, copies=[average])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        train(model, [optimizer], tokens, 1)
        for name, tensor in model.state_dict().items():
            if what == "all tensors" or tensor.is_floating_point():
                average[name] = 0.9 * average[name] + 0.1 * tensor
        controller.step(optimizer)
    kept = [(layer.ssd.takes_part, layer.ssd.neuron_ids_F) for layer in layers_of(model)]
    assert any(part and not torch.equal(ids_F, torch.arange(64)) for part, ids_F in kept)
    model.load_state_dict(average)
    for layer, (part, ids_F) in zip(layers_of(model), kept, strict=True):
        assert layer.ssd.takes_part == part
        assert torch.equal(layer.ssd.neuron_ids_F, ids_F)
    set_mode(model, "sparse")


@pytest.mark.parametrize(
    ("average", "message"),
    [
        (AveragedModel(tiny_gpt2()), "has 0 switchable FFNs"),
        ([torch.zeros(2)], "list of 1; give a module"),
        ({"a": torch.zeros(2)}, "dict of 1; give a module"),
        (3, "is a int; give a module"),
    ],
)
def test_a_copy_of_something_else_is_refused_when_the_controller_is_made(
    switchable_gpt2: nn.Module, tokens: Tensor, average: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG, copies=[average])


@pytest.mark.parametrize("case", ["given", "forgotten", "gone", "another model's"])
def test_a_copy_that_was_not_given_is_told_when_neurons_move(
    tokens: Tensor, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = tiny_gpt2(), tiny_gpt2()
    convert(model, CONFIG)
    convert(other, CONFIG)
    average = AveragedModel(other if case == "another model's" else model)
    copies = [average] if case == "given" else []
    if case == "gone":
        circle: list[Any] = [average]
        circle.append(circle)
        del average, circle
    controller = Controller(model, tokens, total_steps=40, config=CONFIG, copies=copies)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        train(model, [optimizer], tokens, 1)
        controller.step(optimizer)
    assert controller.regroupings > 1
    said = [record.getMessage() for record in caplog.records if "neurons move" in record.getMessage()]
    assert len(said) == (case == "forgotten")
    assert all("in other copies of this model (1)" in each for each in said)
