"""Comparison of checkpoints: brute force, and that it does not matter where neurons stand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import SwitchConfig, convert
from switchable.ffn.convert import layers_of
from switchable.store.probe import Probe
from switchable.study.measures import measure_model
from switchable.study.similarity import Matrix, compare_checkpoints, tokens_within
from switchable.switching.measures import jaccard, pack, routes_changed, unpack
from switchable.switching.switch import regroup


def at_step(step: int) -> nn.Module:
    """One model at two moments of a training: the second's FFNs have moved on a little."""
    model = tiny_gpt2()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for layer in layers_of(model):
            weight = layer.ssd.up_projection.weight
            weight.add_(0.2 * step * torch.randn(weight.shape, generator=generator))
    return model


def shuffle(model: nn.Module, seed: int, times: int = 1) -> nn.Module:
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        labels = [torch.arange(8).repeat(8)[torch.randperm(64, generator=generator)] for _ in range(2)]
        regroup(layers_of(moved), labels)
    return moved


def compared(tokens: Tensor, *models: nn.Module) -> dict[str, list[Matrix]]:
    probe = Probe([{"input_ids": tokens}], "a test")
    patterns = [[pattern for _, pattern in measure_model(model, probe)] for model in models]
    return compare_checkpoints(patterns, [64, 64])


def active_sets(model: nn.Module, tokens: Tensor, index: int) -> list[set[int]]:
    """The original numbers of the neurons active on each token, read off one by one."""
    layer, seen = layers_of(model)[index], []
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(input_ids=tokens)
        hook.remove()
        hidden_TF = layer.ssd.activations(seen[0].reshape(-1, layer.ssd.d_model))
    names = layer.ssd.neuron_ids_F.tolist()
    return [{names[i] for i in range(64) if float(row[i]) > 0} for row in hidden_TF]


def test_pairs_equal_brute_force_whatever_was_regrouped(tokens: Tensor) -> None:
    models = [at_step(0), shuffle(at_step(1), 5, times=3), shuffle(at_step(2), 6)]
    found = compared(tokens, *models)
    for layer in range(2):
        sets = [active_sets(m, tokens, layer) for m in models]
        on = [[[float(i in s) for i in range(64)] for s in tokens_of] for tokens_of in sets]
        for a in range(3):
            for b in range(3):
                index = np.mean([len(s & t) / len(s | t) for s, t in zip(sets[a], sets[b], strict=True)])
                assert found["pattern"][layer][a, b] == pytest.approx(index), (layer, a, b)
                slow = coactivation_correlation(np.array(on[a]), np.array(on[b]))
                assert found["coactivation"][layer][a, b] == pytest.approx(slow, abs=1e-5)
        assert found["pattern"][layer][0, 1] < 0.95  # or the test would compare nothing


def coactivation_correlation(a: np.ndarray, b: np.ndarray) -> float:
    entries = []
    for on in (a, b):
        with np.errstate(invalid="ignore", divide="ignore"):
            matrix = np.nan_to_num(np.corrcoef(on.T))
        entries.append([matrix[i, j] for i in range(64) for j in range(i + 1, 64)])
    return float(np.corrcoef(entries)[0, 1])


def test_regrouping_alone_changes_no_pattern(tokens: Tensor) -> None:
    """The same function with its neurons elsewhere: the same pattern; and elsewhere is a real difference."""
    model = at_step(1)
    moved = shuffle(model, 7, times=2)
    found = compared(tokens, model, moved)
    for layer in range(2):
        assert found["pattern"][layer][0, 1] == 1.0
        assert found["coactivation"][layer][0, 1] == pytest.approx(1.0, abs=1e-9)
    for layer in layers_of(moved):
        layer.ssd.neuron_ids_F = torch.arange(64)  # as if nobody had kept track
    wrong = compared(tokens, model, moved)
    assert wrong["coactivation"][0][0, 1] < 0.5


def test_neurons_are_followed_by_their_weights() -> None:
    """After any number of regroupings, row i holds the weights that neuron_ids_F[i] had at the start."""
    model = at_step(1)
    moved = shuffle(model, 8, times=4)
    for before, after in zip(layers_of(model), layers_of(moved), strict=True):
        assert not torch.equal(after.ssd.neuron_ids_F, torch.arange(64))
        assert torch.equal(after.ssd.weights.up_FD, before.ssd.weights.up_FD[after.ssd.neuron_ids_F])
        assert torch.equal(after.ssd.weights.down_FD, before.ssd.weights.down_FD[after.ssd.neuron_ids_F])


def test_packed_patterns_by_hand() -> None:
    ids = torch.tensor([2, 0, 1])  # row 0 holds the neuron that stood in row 2
    active = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    packed = pack(active, ids)
    assert unpack(packed, 3).tolist() == [[False, False, True], [True, False, True], [False, False, False]]
    other = pack(torch.tensor([[True, True, False], [True, True, True], [False] * 3]), torch.arange(3))
    # {2} and {0, 1}: 0; {0, 2} and {0, 1, 2}: 2/3; nothing and nothing: 1.
    assert jaccard(packed, other) == pytest.approx((0 + 2 / 3 + 1) / 3)


def test_changes_of_experts_by_hand() -> None:
    before = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    after = torch.tensor([[1, 0], [2, 0], [6, 7], [6, 7]])
    assert routes_changed(before, after) == 2 / 4
    assert routes_changed(before, after[:, :1]) is None  # of another K every set is another one


def test_a_layer_whose_neurons_never_change_has_no_correlation(tokens: Tensor) -> None:
    silent = at_step(0)
    with torch.no_grad():
        layers_of(silent)[0].ssd.up_projection.weight.zero_()
        layers_of(silent)[0].ssd.up_projection.bias.fill_(-1.0)
    found = compared(tokens, silent, at_step(1))
    assert np.isnan(found["coactivation"][0][0, 1])
    assert np.isfinite(found["pattern"][0]).all()


def test_memory_is_bounded() -> None:
    # 20 checkpoints of 32 layers of 11,008 neurons: 512 MiB of bits leave room for 609 tokens.
    assert tokens_within(20, 32 * 11_008) == 512 * 2**20 * 8 // (20 * 32 * 11_008) == 609
    assert tokens_within(12, 4 * 1024) > 4096
