"""Other people's optimizers and averaged weights: their neurons move along, or they are refused at the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from switchable import InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.switching.controller import Controller
from switchable.switching.copies import copied_tensors, twins
from switchable.switching.optimizers import check_state, optimizers_in
from switchable.switching.switch import current_structure, regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3, monitor_every=1, monitor_growth=1.0)


class StackedMuon(torch.optim.Optimizer):
    """Muon for matrices of one shape, all in one batch: the first of a group keeps the state of all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            first, params = group["params"][0], group["params"]
            gradients = torch.stack([p.grad for p in params])
            state = self.state[first]
            moment = state.setdefault("momentum", torch.zeros_like(gradients))
            rows = state.setdefault("rows", torch.zeros_like(gradients[..., :1]))
            moment.lerp_(gradients, 0.1)
            rows.lerp_(moment.square().mean(-1, keepdim=True), 0.1)
            for p, update in zip(params, moment / (rows.sqrt() + 1e-8), strict=True):
                u, _, vt = torch.linalg.svd(update, full_matrices=False)
                p.sub_(0.02 * (u @ vt))


class Lookahead:
    """Slow weights beside an optimizer's fast ones (Zhang et al. 2019), as wrappers are often written."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {"slow": p.detach().clone()} for group in self.param_groups for p in group["params"]
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p, kept in self.state.items():
                p.copy_(kept["slow"].lerp_(p, 0.5))


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    inside = {n for n, p in model.named_parameters() if ".h." in n and p.ndim == 2 and "router" not in n}
    named = dict(model.named_parameters())
    return [named[n] for n in named if n in inside], [p for n, p in named.items() if n not in inside]


def muon_and_adamw(model: nn.Module) -> list[Any]:
    matrices, rest = matrices_and_rest(model)
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2)]


def stacked_muon_and_adamw(model: nn.Module) -> dict[str, Any]:
    matrices, rest = matrices_and_rest(model)
    shapes = sorted({tuple(p.shape) for p in matrices})
    groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
    return {"muon": StackedMuon(groups, {}), "adamw": torch.optim.AdamW(rest, lr=1e-2)}


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "muon and adamw": muon_and_adamw,
    "stacked muon and adamw": stacked_muon_and_adamw,
    "lookahead": lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "accelerate's wrapper": lambda model: _Wrapper(torch.optim.AdamW(model.parameters(), lr=1e-2)),
}


BFLOAT16 = {"muon and adamw": 1e-2}
"""Differences allowed where an optimizer itself multiplies in bfloat16; unmoved state gives 2e-2 and 5e-2."""


class _Wrapper:
    """Passes everything on, state too, as accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self) -> None:
        self.optimizer.step()


def train(model: nn.Module, steppers: Iterable[Any], tokens: Tensor, steps: int) -> None:
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        for each in steppers:
            each.step()
        model.zero_grad()


def steppers(given: Any) -> list[Any]:
    return list(given.values()) if isinstance(given, dict) else given if isinstance(given, list) else [given]


def structures(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        current_structure(layer)[torch.randperm(layer.ssd.d_ff, generator=generator)]
        for layer in layers_of(model)
    ]


@pytest.mark.parametrize("only_layer", [None, 1])
@pytest.mark.parametrize("name", MOVES)
def test_training_goes_on_as_if_the_neurons_had_not_moved(
    switchable_gpt2: nn.Module, tokens: Tensor, name: str, only_layer: int | None
) -> None:
    model = switchable_gpt2
    given = MOVES[name](model)
    train(model, steppers(given), tokens, 3)
    unmoved, unmoved_given = copy.deepcopy((model, given))
    wanted: list[Tensor | None] = list(structures(model))
    if only_layer is not None:
        wanted = [labels if i == only_layer else None for i, labels in enumerate(wanted)]
    found = optimizers_in(given)
    check_state(layers_of(model), found)
    perms = regroup(layers_of(model), wanted, found)
    assert [perm is not None for perm in perms] == [labels is not None for labels in wanted]
    train(model, steppers(given), tokens, 3)
    train(unmoved, steppers(unmoved_given), tokens, 3)
    for layer, other, perm in zip(layers_of(model), layers_of(unmoved), perms, strict=True):
        rows = other.ssd.weights.up_FD if perm is None else other.ssd.weights.up_FD[perm]
        torch.testing.assert_close(layer.ssd.weights.up_FD, rows, rtol=1e-4, atol=BFLOAT16.get(name, 1e-5))
    here, there = model(input_ids=tokens).logits, unmoved(input_ids=tokens).logits
    torch.testing.assert_close(here, there, rtol=1e-4, atol=BFLOAT16.get(name, 1e-4))


class _Quantised(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moment_8bit"] = torch.zeros_like(p, dtype=torch.uint8)


class _Subclass(Tensor):
    """Stands for a tensor of quantised blocks."""


class _OfATensorType(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moment"] = torch.zeros_like(p).as_subclass(_Subclass)


class _Flat(torch.optim.SGD):
    """All moments in one vector, kept with the first parameter, which is none of a neuron's."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        params = self.param_groups[0]["params"]
        self.state[params[0]]["all"] = torch.cat([p.flatten() for p in params]).detach()


class _Hidden(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.kept = {"moments": [p.detach().clone() for g in self.param_groups for p in g["params"]]}


class _Listed(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [p.detach().clone()]


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "whole numbers": (lambda m: _Quantised(m.parameters(), lr=0.1), "'moment_8bit' of optimizer _Quantised"),
    "a tensor type": (
        lambda m: _OfATensorType(m.parameters(), lr=0.1),
        "'moment' of optimizer _OfATensorType",
    ),
    "one vector of all": (lambda m: _Flat(m.parameters(), lr=0.1), "'all' of optimizer _Flat"),
    "kept elsewhere": (lambda m: _Hidden(m.parameters(), lr=0.1), "_Hidden keeps a tensor .* 'kept'"),
    "a list": (lambda m: _Listed(m.parameters(), lr=0.1), "'history' of optimizer _Listed .*list"),
    "one of two": (lambda m: muon_and_adamw(m)[:1], "router of .* none of the optimizers"),
    "the other of two": (lambda m: muon_and_adamw(m)[1:], "FFN of .* none of the optimizers"),
    "none": (lambda _: "adamw", "no optimizer in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_move_is_refused_at_the_first_step_and_nothing_moves(
    switchable_gpt2: nn.Module, tokens: Tensor, name: str
) -> None:
    build, message = REFUSED[name]
    given = build(switchable_gpt2)
    controller = Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG)
    train(switchable_gpt2, [each for each in steppers(given) if hasattr(each, "step")], tokens, 1)
    weights = copy.deepcopy(switchable_gpt2.state_dict())
    with pytest.raises(InputError, match=message):
        controller.step(given)
    assert controller.steps_done == 0
    assert all(torch.equal(t, weights[n]) for n, t in switchable_gpt2.state_dict().items())


def test_frozen_routers_are_refused(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    for layer in layers_of(switchable_gpt2):
        layer.router.requires_grad_(False)
    controller = Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG)
    with pytest.raises(InputError, match=r"router of .* is frozen .* modules_to_save"):
        controller.step(torch.optim.AdamW(switchable_gpt2.parameters()))


def test_frozen_ffns_need_no_optimizer(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    for layer in layers_of(switchable_gpt2):
        for projection in (layer.ssd.up_projection, layer.ssd.down_projection):
            projection.requires_grad_(False)
    trained = [p for p in switchable_gpt2.parameters() if p.requires_grad]
    assert Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG).step(torch.optim.AdamW(trained))


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
