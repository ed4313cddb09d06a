"""The structure: what neurons are described by, all layers at once (threads, ranks), and comparing groupings."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from switchable import progress
from switchable.errors import InputError
from switchable.structure import features, kmeans
from switchable.structure import groups as structure
from switchable.structure.kmeans import BalancedKMeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(count: int = 5, neurons: int = 96, width: int = 12) -> list[Tensor]:
    return [torch.randn(neurons, width, generator=generator(seed)) for seed in range(count)]


def firing(groups: int = 6, size: int = 8, tokens: int = 3000) -> tuple[Tensor, Tensor]:
    """Neurons of a group fire on the same tokens (one group per token), with 10 % of misses; and their group."""
    draw = generator()
    group_F = torch.arange(groups).repeat(size)[torch.randperm(groups * size, generator=draw)]
    on_T = torch.randint(groups, (tokens,), generator=draw)
    active_TF = on_T[:, None] == group_F
    return active_TF & (torch.rand(active_TF.shape, generator=draw) < 0.9), group_F


def test_weight_features_are_unit_rows_and_zero_rows_stay() -> None:
    up_FD = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, -4e-30], [3e30, 4e30]], requires_grad=True)
    wanted = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8], [0.6, 0.8]])
    rows = features.weight_features(up_FD)
    torch.testing.assert_close(rows, wanted)
    assert not rows.requires_grad
    assert features.weight_features(up_FD.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["bool", "values"])
def test_coactivation_inner_products_are_correlations(kind: str) -> None:
    # 2,500 tokens are several pieces; as many dimensions as neurons leave nothing out.
    active_TF = torch.rand(2500, 10, generator=generator()) @ torch.rand(10, 10, generator=generator(1))
    active_TF = active_TF > active_TF.mean() if kind == "bool" else (active_TF - active_TF.mean()).relu()
    rows = features.coactivation_features(active_TF, width=10)
    torch.testing.assert_close(rows @ rows.T, torch.corrcoef(active_TF.T.float()), atol=1e-4, rtol=1e-4)


def test_coactivation_keeps_the_leading_dimensions() -> None:
    active_TF, _ = firing()
    correlation = torch.corrcoef(active_TF.T.float())
    values, vectors = torch.linalg.eigh(correlation)
    best = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    rows = features.coactivation_features(active_TF, width=5)
    assert rows.shape == (48, 5)
    torch.testing.assert_close(rows @ rows.T, best, atol=2e-3, rtol=0)


def test_coactivation_finds_the_neurons_that_fire_together() -> None:
    active_TF, group_F = firing()
    rows = features.coactivation_features(active_TF, width=6)
    (labels_F,) = structure.cluster_layers([rows], 6)
    assert adjusted_rand_score(labels_F, group_F) == 1.0


def test_coactivation_of_constant_neurons_is_zero() -> None:
    active_TF = torch.rand(200, 6, generator=generator()) < 0.3
    active_TF[:, 1] = False
    active_TF[:, 4] = True
    rows = features.coactivation_features(active_TF, width=3)
    assert (rows[[1, 4]] == 0).all()
    assert (rows[[0, 2, 3, 5]].norm(dim=1) > 0.1).all()
    values_TF = torch.full((200, 3), 0.1)  # not exact in binary: rounding must not pass for activity
    assert (features.coactivation_features(values_TF, width=3) == 0).all()


def test_coactivation_is_deterministic_and_leaves_the_global_state() -> None:
    active_TF, _ = firing()
    before = torch.random.get_rng_state()
    first, again = (features.coactivation_features(active_TF, width=4) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())


def test_mixed_cosines_add_up() -> None:
    weight, coactive = torch.randn(20, 7, generator=generator()), torch.randn(20, 3, generator=generator(1))
    mixed = features.mixed_features(weight, coactive)
    cosines = [torch.nn.functional.normalize(x, dim=1) for x in (weight, coactive, mixed)]
    weight_FF, coactive_FF, mixed_FF = (x @ x.T for x in cosines)
    torch.testing.assert_close(mixed_FF, (weight_FF + coactive_FF) / 2, atol=1e-5, rtol=1e-5)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_all_layers_give_what_each_alone_gives() -> None:
    rows = layers()
    labels = structure.cluster_layers(rows, 8, random_state=3)
    for i, (rows_FD, labels_F) in enumerate(zip(rows, labels, strict=True)):
        assert torch.equal(labels_F, BalancedKMeans(8, random_state=3 + i).fit(rows_FD).labels_)
    torch.set_num_threads(1)
    assert all(map(torch.equal, labels, structure.cluster_layers(rows, 8, random_state=3)))
    assert structure.cluster_layers([], 8) == []


@pytest.mark.usefixtures("three_threads")
def test_threads_of_torch_are_as_before() -> None:
    structure.cluster_layers(layers(2), 8)
    assert torch.get_num_threads() == 3


def test_the_better_of_warm_and_fresh_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(96, 4, generator=generator())
    bad = torch.arange(96) % 8
    warm = BalancedKMeans(8, init=bad).fit(rows)
    fresh = BalancedKMeans(8).fit(rows)
    gain = 1 - fresh.inertia_ / warm.inertia_
    assert gain > 0.01  # else this test tests nothing
    only_warm = structure.cluster_layers([rows], 8, warm=[bad], fresh=False)[0]
    assert torch.equal(only_warm, warm.labels_)
    monkeypatch.setattr(structure, "MARGIN", 0.0)
    better = structure.cluster_layers([rows], 8, warm=[bad])[0]
    monkeypatch.setattr(kmeans, "MOST_ITERATIONS", 1)
    assert BalancedKMeans(8, init=better).fit(rows).inertia_ < warm.inertia_
    monkeypatch.undo()  # the iterations
    monkeypatch.setattr(structure, "MARGIN", 0.9)
    # It kept its numbers where it could: matching again changes nothing.
    assert torch.equal(structure.match_labels(bad, better, 8), better)
    held = structure.cluster_layers([rows], 8, warm=[bad])[0]
    assert torch.equal(held, warm.labels_)


def test_a_settled_structure_stays() -> None:
    rows = layers()
    labels = structure.cluster_layers(rows, 8)
    settled = structure.cluster_layers(rows, 8, warm=labels, fresh=False)
    again = structure.cluster_layers(rows, 8, warm=[*settled[:-1], None])
    assert all(map(torch.equal, settled[:-1], again[:-1]))
    assert torch.equal(again[-1], labels[-1])  # no start given: from scratch, by the same seed


def test_the_bar_appears_only_when_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    structure.cluster_layers(layers(3), 8)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    structure.cluster_layers(layers(3), 8)
    assert "clustering" in capsys.readouterr().err


def _rank_main(folder: str, rank: int) -> None:
    """One of two processes: cluster together, then meet an error that only rank 1 can see."""
    dist.init_process_group("gloo")
    labels = structure.cluster_layers(layers(), 8, random_state=3)
    said = ""
    broken = layers(3)
    if rank == 1:
        broken[1][0, 0] = float("nan")  # layer 1 is rank 1's
    try:
        structure.cluster_layers(broken, 8)
    except InputError as error:
        said = str(error)
    torch.save((labels, said), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_share_the_layers_and_agree(tmp_path: Path) -> None:
    alone = structure.cluster_layers(layers(), 8, random_state=3)
    ended = run_ranks(2, _rank_main, str(tmp_path), per_rank=[(0,), (1,)], log=tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    for rank in (0, 1):
        labels, said = torch.load(tmp_path / f"{rank}.pt")
        assert all(map(torch.equal, labels, alone))
        assert "layer 1 of 3" in said
        assert "NaN" in said


def test_match_labels_by_hand_and_against_all_renumberings() -> None:
    old = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    new = torch.tensor([2, 2, 0, 0, 0, 2, 1, 1, 1])
    assert structure.match_labels(old, new, 3).tolist() == [0, 0, 1, 1, 1, 0, 2, 2, 2]
    old, new = (torch.randint(4, (40,), generator=generator(seed)) for seed in (0, 1))
    kept = int((structure.match_labels(old, new, 4) == old).sum())
    best = max(int((torch.tensor(p)[new] == old).sum()) for p in itertools.permutations(range(4)))
    assert kept == best
    matched = structure.match_labels(old, new, 4)
    assert adjusted_rand_score(matched, new) == 1.0


def test_permutation_by_hand() -> None:
    # Expert 0 owns places 0-1 and gets neuron 3 for 1; expert 1 owns 2-3 and gets neuron 1 for 3.
    assert structure.permutation_from_labels(torch.tensor([0, 1, 1, 0]), 2).tolist() == [0, 3, 2, 1]
    labels = torch.tensor([2, 2, 1, 1, 0, 0])
    assert structure.permutation_from_labels(labels, 3).tolist() == [4, 5, 2, 3, 0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_permutation_groups_the_experts_and_moves_no_more_than_it_must(seed: int) -> None:
    labels = torch.arange(60) // 10
    moved = torch.randperm(60, generator=generator(seed))[:20]
    labels[moved] = labels[moved[torch.randperm(20, generator=generator(seed + 10))]]
    perm = structure.permutation_from_labels(labels, 6)
    assert torch.equal(perm.sort().values, torch.arange(60))
    assert torch.equal(labels[perm], torch.arange(60) // 10)
    at_home = labels == torch.arange(60) // 10
    assert torch.equal(perm[at_home], torch.arange(60)[at_home])


def test_an_unchanged_structure_is_the_identity() -> None:
    labels = torch.arange(48).reshape(8, 6) // 6
    perm = structure.permutation_from_labels(labels.flatten(), 8)
    assert torch.equal(perm, torch.arange(48))


ROWS = torch.ones(6, 2)
LABELS = torch.arange(6) // 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: features.weight_features(torch.ones(3)), r"up_FD is \(3,\)"),
        (lambda: features.weight_features([[1.0]]), "up_FD is list"),  # type: ignore[arg-type]
        (lambda: features.weight_features(ROWS * float("nan")), "NaN"),
        (lambda: features.coactivation_features(torch.ones(0, 4)), r"active_TF is \(0, 4\)"),
        (lambda: features.mixed_features(ROWS, ROWS[:3]), "6 rows of weights, 3 of co-activation"),
        (
            lambda: structure.cluster_layers([ROWS], 4),
            "layer 0 of 1: n_clusters=4 does not divide the 6 rows",
        ),
        (lambda: structure.cluster_layers([ROWS], 3, warm=[]), "0 warm starts for 1 layers"),
        (lambda: structure.cluster_layers([ROWS], 3, warm=[LABELS // 2]), "unequal sizes"),
        (lambda: structure.match_labels(LABELS, LABELS[:4], 3), "labels of 6 and 4 neurons"),
        (lambda: structure.match_labels(LABELS, LABELS.float(), 3), "new_labels is"),
        (lambda: structure.match_labels(LABELS, LABELS, 2), "old_labels go from 0 to 2 with num_experts=2"),
        (lambda: structure.permutation_from_labels(LABELS - 1, 3), "labels_F go from -1 to 1"),
        (lambda: structure.permutation_from_labels(LABELS // 2, 2), "experts of 2 to 4 neurons"),
        (lambda: structure.permutation_from_labels(ROWS, 2), "labels_F is"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
