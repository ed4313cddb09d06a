"""Every measure of a study against a slow computation, token by token and neuron by neuron."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.store.probe import Probe
from switchable.study.measures import (
    QUANTILES,
    measure_model,
    needed_neurons,
)
from switchable.switching.switch import regroup


def shuffled(activation: str = "relu") -> nn.Module:
    """A converted model whose neurons have been moved about."""
    model = tiny_gpt2(activation)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    generator = torch.Generator().manual_seed(3)
    labels = [torch.arange(8).repeat(8)[torch.randperm(64, generator=generator)] for _ in range(2)]
    regroup(layers_of(model), labels)
    return model


def probe_of(tokens: Tensor) -> Probe:
    return Probe([{"input_ids": tokens[:3]}, {"input_ids": tokens[3:]}], "a test")


def hidden_and_input(model: nn.Module, tokens: Tensor, index: int) -> tuple[Tensor, Tensor]:
    layer, seen = layers_of(model)[index], []
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(input_ids=tokens)
        hook.remove()
        x_TD = seen[0].reshape(-1, layer.ssd.d_model)
        return layer.ssd.activations(x_TD), x_TD


def enough(a: Tensor, down: Tensor) -> list[bool]:
    """Whether the 0, 1, 2, ... strongest neurons leave an error of at most 1 %, by adding one after another."""
    whole = a @ down
    order = (a.abs() * down.norm(dim=1)).argsort(descending=True, stable=True)
    found = []
    for count in range(len(a) + 1):
        kept = torch.zeros_like(a)
        kept[order[:count]] = a[order[:count]]
        found.append(float((whole - kept @ down).norm()) <= 0.01 * float(whole.norm()))
    return found


def slow_needed(a: Tensor, down: Tensor) -> int:
    return enough(a, down).index(True)


@pytest.mark.parametrize("index", [0, 1])
def test_measures_equal_brute_force(tokens: Tensor, index: int) -> None:
    model = shuffled()
    layer = layers_of(model)[index]
    found, _ = measure_model(model, probe_of(tokens))[index]
    hidden_TF, x_TD = hidden_and_input(model, tokens, index)
    down = layer.ssd.weights.down_FD.detach()
    active = [[float(a) > 0 for a in row] for row in hidden_TF]
    ratios = [sum(row) / 64 for row in active]
    assert found.activation_ratio == pytest.approx(sum(ratios) / len(ratios))
    assert found.ratio_quantiles == pytest.approx(np.quantile(ratios, QUANTILES))
    fired = [sum(row[i] for row in active) for i in range(64)]
    assert found.dead == fired.count(0) / 64
    assert found.always_on == fired.count(len(active)) / 64
    needed = [slow_needed(row, down) for row in hidden_TF]
    assert found.needed == pytest.approx(sum(needed) / len(needed) / 64)

    best, routed, load, total = np.zeros(8), np.zeros(8), [0] * 8, 0.0
    for row, x in zip(hidden_TF, x_TD, strict=True):
        mass = [sum(float(row[i].abs() * down[i].norm()) for i in range(8 * e, 8 * e + 8)) for e in range(8)]
        scores = (layer.router.weight @ x + layer.router.bias).tolist()
        order = sorted(range(8), key=lambda e: -scores[e])
        for e in order[:3]:
            load[e] += 1
        best += np.cumsum(sorted(mass, reverse=True))
        routed += np.cumsum([mass[e] for e in order])
        total += sum(mass)
    assert found.mass_best == pytest.approx(best / total, rel=1e-5)
    assert found.mass_router == pytest.approx(routed / total, rel=1e-5)
    assert (found.experts_per_token, found.takes_part) == (3, True)
    assert found.mass_caught == found.mass_router[2]
    assert found.mass_best_k == found.mass_best[2]
    assert found.mass_random == pytest.approx([k / 8 for k in range(1, 9)])
    assert found.load == pytest.approx([n / sum(load) for n in load])
    assert found.load_imbalance == pytest.approx(max(load) / (sum(load) / 8))


def test_for_other_activations_those_neurons_are_active_that_give_99_percent(tokens: Tensor) -> None:
    model = shuffled("gelu_new")
    found, _ = measure_model(model, probe_of(tokens))[1]
    hidden_TF, _ = hidden_and_input(model, tokens, 1)
    down = layers_of(model)[1].ssd.weights.down_FD.detach()
    needed_T, active_TF = needed_neurons(hidden_TF, down)
    for row, needed, active in zip(hidden_TF, needed_T.tolist(), active_TF, strict=True):
        suffices = enough(row, down)
        assert suffices[needed]
        assert not suffices[needed - 1]
        weakest = (row.abs() * down.norm(dim=1))[active].min()
        assert int(active.sum()) == needed
        assert float(weakest) >= float((row.abs() * down.norm(dim=1))[~active].max())
    assert found.activation_ratio == pytest.approx(float(needed_T.double().mean()) / 64)
    assert 0.3 < found.activation_ratio < 1.0
    assert found.needed == pytest.approx(found.activation_ratio)


def test_needed_neurons_by_hand() -> None:
    down = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    hidden = torch.tensor([[5.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 0.001], [0.0, 0.0, 0.0, 0.0]])
    needed, active = needed_neurons(hidden, down)
    assert needed.tolist() == [1, 3, 0]
    assert active.tolist() == [[True, False, False, False], [True, True, True, False], [False] * 4]


def test_measuring_leaves_the_model_as_it_was_and_fewer_patterns_can_be_kept(tokens: Tensor) -> None:
    model = shuffled().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    (_, all_TW), _ = measure_model(model, probe_of(tokens))
    (_, some_TW), _ = measure_model(model, probe_of(tokens), pattern_tokens=40)
    assert torch.equal(some_TW, all_TW[::3])  # 96 tokens, every third
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))
