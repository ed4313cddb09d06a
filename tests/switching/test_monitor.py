"""Every measure against a brute-force computation, and a pass that leaves no trace in the model."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from support import HomeMade
from torch import Tensor, nn

from switchable import Controller, InputError, SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of
from switchable.ffn.families import Family
from switchable.switching.monitor import measure, watch
from switchable.switching.switch import regroup


def brute_force(model: nn.Module, tokens: Tensor, index: int) -> dict[str, Any]:
    """The same measures, token by token and neuron by neuron."""
    layer = layers_of(model)[index]
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    x = inputs[0].reshape(-1, layer.ssd.d_model)
    up, down, bias = layer.ssd.weights.up_FD, layer.ssd.weights.down_FD, layer.ssd.weights.up_bias_F
    up, down, bias = up.detach(), down.detach(), bias.detach()  # type: ignore[union-attr]
    active = best = total = 0.0
    caught = [0.0] * layer.ssd.num_experts
    load = [0] * layer.ssd.num_experts
    fired = [0] * layer.ssd.d_ff
    for row in x:  # the slow way round on purpose
        masses = [0.0] * layer.ssd.num_experts
        for i in range(layer.ssd.d_ff):
            a = max(0.0, float(row @ up[i] + bias[i]))
            active += a > 0
            fired[i] += a > 0
            masses[i // (layer.ssd.d_ff // layer.ssd.num_experts)] += a * float(down[i].norm())
        scores = (layer.router.weight @ row + layer.router.bias).tolist()
        ranked = sorted(range(layer.ssd.num_experts), key=lambda e: -scores[e])
        for e in ranked[: layer.ssd.experts_per_token]:
            load[e] += 1
        for k in range(layer.ssd.num_experts):
            caught[k] += sum(masses[e] for e in ranked[: k + 1])
        best += sum(sorted(masses)[-layer.ssd.experts_per_token :])
        total += sum(masses)
    return {
        "activation_ratio": active / (len(x) * layer.ssd.d_ff),
        "mass_caught": caught[layer.ssd.experts_per_token - 1] / total,
        "mass_by_k": [value / total for value in caught],
        "mass_best": best / total,
        "load_imbalance": max(load) / (sum(load) / len(load)),
        "dead": fired.count(0) / layer.ssd.d_ff,
        "always_on": fired.count(len(x)) / layer.ssd.d_ff,
    }


def test_measures_equal_brute_force(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    probe = [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}]
    measures, found = measure(switchable_gpt2, probe, [None, None], random_state=0)
    for index, measured in enumerate(measures):
        for name, value in brute_force(switchable_gpt2, tokens, index).items():
            assert getattr(measured, name) == pytest.approx(value, rel=1e-5), name
    again, _ = measure(switchable_gpt2, probe, found, random_state=0)
    assert [(m.pattern_similarity, m.routing_changed) for m in again] == [(1.0, 0.0)] * 2
    with torch.no_grad():  # every neuron that fired is silent now, and the others fire
        first = layers_of(switchable_gpt2)[0]
        first.ssd.up_projection.weight.neg_()
        first.ssd.up_projection.bias.neg_()
        first.router.weight.neg_()
        first.router.bias.neg_()
    turned, _ = measure(switchable_gpt2, probe, found, random_state=0)
    assert turned[0].pattern_similarity == 0.0
    assert turned[0].routing_changed == 1.0


class Planted(nn.Module):
    """One FFN in which neuron i fires on token t if and only if pattern_TF[t, i]: its input is one-hot."""

    def __init__(self, pattern_TF: Tensor) -> None:
        super().__init__()
        tokens, neurons = pattern_TF.shape
        self.mlp = HomeMade.MyMLP()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(tokens, neurons), nn.Linear(neurons, tokens)
        nn.init.zeros_(self.mlp.fc1.bias)
        self.plant(pattern_TF)

    def plant(self, pattern_TF: Tensor) -> None:
        with torch.no_grad():
            self.mlp.fc1.weight.copy_(2.0 * pattern_TF.T - 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_how_much_a_planted_pattern_moves() -> None:
    sets = [
        ([0, 1], [0, 1]),  # the same: 1
        ([2, 3], [3, 4]),  # one of three: 1/3
        ([], []),  # nothing differs: 1
        ([5], [6, 7]),  # nothing in common: 0
        ([0, 1, 2, 3], [1, 2, 3, 4, 5, 6, 7]),  # three of eight
    ]
    before, now = torch.zeros(5, 8), torch.zeros(5, 8)
    for token, pair in enumerate(sets):
        for pattern, neurons in zip((before, now), pair, strict=True):
            pattern[token, neurons] = 1.0
    model, probe = Planted(before), [torch.eye(5)[None]]
    convert(
        model, SwitchConfig(num_experts=2, experts_per_token=1), Family(ffn="MyMLP", up="fc1", down="fc2")
    )
    (first,), found = measure(model, probe, [None], 0)
    assert (first.activation_ratio, first.pattern_similarity) == (pytest.approx(9 / 40), None)
    # Moved neurons are the same neurons.
    (perm_F,) = regroup(layers_of(model), [torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])])
    assert perm_F is not None
    (still,), _ = measure(model, probe, found, 0)
    assert still.pattern_similarity == 1.0
    model.plant(now[:, layers_of(model)[0].ssd.neuron_ids_F])
    (moved,), _ = measure(model, probe, found, 0)
    assert moved.activation_ratio == pytest.approx(13 / 40)
    assert moved.pattern_similarity == pytest.approx((1 + 1 / 3 + 1 + 0 + 3 / 8) / 5)


@pytest.mark.parametrize("structure", ["weights", "coactivation", "mixed"])
def test_every_kind_of_structure_is_balanced(
    switchable_gpt2: nn.Module, tokens: Tensor, structure: str
) -> None:
    _, found = measure(switchable_gpt2, [{"input_ids": tokens}], [None, None], 0, structure)
    for layer in found:
        assert torch.equal(torch.bincount(layer.labels_F, minlength=8), torch.full((8,), 8))


def test_watching_leaves_the_model_as_it_was(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    set_mode(switchable_gpt2, "sparse")
    switchable_gpt2.train()
    state = torch.get_rng_state()
    watch(switchable_gpt2, [{"input_ids": tokens}])
    assert switchable_gpt2.training
    assert all(
        layer.ssd.mode == "sparse" and not layer._forward_pre_hooks for layer in layers_of(switchable_gpt2)
    )
    assert torch.equal(torch.get_rng_state(), state)


CONFIG = SwitchConfig(
    num_experts=8,
    experts_per_token=3,
    monitor_every=2,
    min_dense_fraction=0.1,
    final_dense_fraction=0.2,
    stability_threshold=0.0,
    max_activation_ratio=1.0,
    min_mass_caught=0.0,
    sparse_steps=2,
)


def test_the_controller_drives_any_loop(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    model = switchable_gpt2
    controller = Controller(model, tokens, total_steps=20, config=CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    modes, measured = [], []
    for _ in range(20):
        modes.append(layers_of(model)[0].ssd.mode[0])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measurement = controller.step(optimizer)
        if measurement is not None:
            measured.append(measurement.step)
    assert "".join(modes) == "ddssdssdssdssdssdddd"[:16] + "dddd"
    assert measured == list(range(2, 21, 2))
    assert controller.switches == sum(a != b for a, b in itertools.pairwise(modes))


def test_the_structure_is_carried_along_until_the_last_measurement_before_layers_join(
    switchable_gpt2: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = switchable_gpt2, []

    def spy(*args: Any, **keywords: Any) -> Any:
        tried.append(keywords["fresh"])
        return measure(*args, **keywords)

    monkeypatch.setattr("switchable.switching.controller.measure", spy)
    config = dataclasses.replace(CONFIG, min_dense_fraction=0.8, final_dense_fraction=0.0)
    controller = Controller(model, tokens, total_steps=20, config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = [m for _ in range(20) if (m := controller.step(optimizer)) is not None]
    assert [m.step for m in found] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert tried == [m.step == 14 for m in found]  # layers join after 16, with what was found after 14
    # The weights stand still, and so do patterns.
    assert all(layer.pattern_similarity == 1.0 for m in found[1:] for layer in m.layers)


def test_a_regrouping_is_one_in_which_neurons_move(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    never_joins = dataclasses.replace(CONFIG, min_mass_caught=1.0)
    controller = Controller(switchable_gpt2, tokens, total_steps=20, config=never_joins)
    optimizer = torch.optim.SGD(switchable_gpt2.parameters(), lr=0.0)
    found = [m for m in (controller.step(optimizer) for _ in range(10)) if m is not None]
    # The weights stay what they are, and so does the structure that is found: only the first one moves neurons.
    assert len(found) > 2
    assert [m.regrouped for m in found] == [(True, True)] + [(False, False)] * (len(found) - 1)
    assert controller.regroupings == 2


def test_a_measurement_tells_the_k_it_was_taken_with(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    config = dataclasses.replace(CONFIG, mass_target=0.9)
    controller = Controller(switchable_gpt2, tokens, total_steps=100, config=config)
    optimizer = torch.optim.SGD(switchable_gpt2.parameters(), lr=0.0)
    first, second, *_, before, last = [
        m for m in (controller.step(optimizer) for _ in range(60)) if m is not None
    ][:5]
    assert [layer.experts_per_token for layer in first.layers] == [3, 3]
    assert first.experts_per_token[0] > 3
    assert tuple(layer.experts_per_token for layer in second.layers) == first.experts_per_token
    for k, layer in zip(first.experts_per_token, second.layers, strict=True):
        assert layer.mass_caught == layer.mass_by_k[k - 1]
    assert second.layers[0].routing_changed is None  # of another K every set is another one
    assert last.layers[0].experts_per_token == before.layers[0].experts_per_token
    assert last.layers[0].routing_changed == 0.0


def test_an_optimizer_without_the_routers_is_refused(switchable_gpt2: nn.Module, tokens: Tensor) -> None:
    controller = Controller(switchable_gpt2, tokens, total_steps=20, config=CONFIG)
    others = [p for n, p in switchable_gpt2.named_parameters() if "router" not in n]
    with pytest.raises(
        InputError, match=r"the router of .* is in none of the optimizers .* built after convert"
    ):
        controller.step(torch.optim.AdamW(others))


def test_an_unconverted_model_is_refused() -> None:
    with pytest.raises(InputError, match="call convert"):
        Controller(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.long), total_steps=5)
