"""The K highest scores, compared with `torch.topk`."""

from __future__ import annotations

import math

import pytest
import torch
from compute.machines import machine_seen_by

from switchable.compute.cpu import topk as selection
from switchable.compute.cpu.topk import top_experts

machine = machine_seen_by(selection)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"),
    [(300, 128, 18), (64, 6, 2), (257, 24, 23), (100, 7, 3), (70, 1024, 1), (1000, 32, 6)],
)
def test_equals_torch_topk(tokens: int, experts: int, chosen: int) -> None:
    torch.manual_seed(0)
    scores_TE = torch.randn(tokens, experts) * 10.0 ** torch.randint(-20, 20, (tokens, experts))
    ours, true = top_experts(scores_TE, chosen), scores_TE.topk(chosen).indices
    assert ours.dtype == torch.int64
    assert torch.equal(ours.sort().values, true.sort().values)


@pytest.mark.usefixtures("machine")
def test_equal_scores_are_taken_once_each() -> None:
    torch.manual_seed(0)
    scores_TE = torch.randint(-2, 3, (500, 16)).float()
    ids_TK = top_experts(scores_TE, 5).sort().values
    assert (ids_TK.diff() > 0).all()
    true = scores_TE.topk(5).values.sort().values
    assert torch.equal(scores_TE.gather(1, ids_TK).sort().values, true)


def test_signs_zeros_infinities_and_nan() -> None:
    row = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1e-45, 3.0, torch.inf, torch.nan])
    scores_TE = row.expand(64, 8).contiguous()
    assert top_experts(scores_TE, 4).sort().values.tolist() == [[4, 5, 6, 7]] * 64
    assert top_experts(scores_TE, 7).sort().values.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 64


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "dtype"),
    [
        (10, 8, 2, torch.float32),
        (100, 8, 8, torch.float32),
        (100, 8, 2, torch.float64),
        (64, 1100, 3, torch.float32),
    ],
)
def test_few_tokens_all_experts_and_other_numbers(
    tokens: int, experts: int, chosen: int, dtype: torch.dtype
) -> None:
    scores_TE = torch.randn(tokens, experts, dtype=dtype)
    true = scores_TE.topk(chosen).indices.sort().values
    assert torch.equal(top_experts(scores_TE, chosen).sort().values, true)


def test_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "this_machine", lambda: None)
    scores_TE = torch.randn(100, 8)
    assert torch.equal(top_experts(scores_TE, 2).sort().values, scores_TE.topk(2).indices.sort().values)


@pytest.mark.parametrize("tokens", [1, 64])
def test_the_fewest_experts_whose_shares_add_up_to_the_mass(tokens: int) -> None:
    # Shares of 0.5, 0.3, 0.1, 0.06 and 0.04, and whatever is added to all the scores.
    scores_TE = torch.tensor([0.1, 0.5, 0.06, 0.3, 0.04]).log().expand(tokens, 5) + 7.0
    kept = {0.3: [1], 0.55: [1, 3], 0.85: [0, 1, 3], 0.95: [0, 1, 2, 3], 0.99: [0, 1, 2, 3, 4]}
    for mass, ids in kept.items():
        for most in range(1, 6):
            few = [e for e in (1, 3, 0, 2, 4) if e in ids][:most]
            row = sorted(few) + [5] * (most - len(few))
            found_TK = top_experts(scores_TE, most, mass).sort().values
            assert found_TK.tolist() == [row] * tokens, (mass, most)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "mass"),
    [(300, 128, 18, 0.9), (64, 6, 6, 0.5), (257, 24, 23, 0.99), (100, 7, 3, 0.2), (70, 1024, 5, 0.9)],
)
def test_compiled_code_and_torch_keep_the_same_experts(
    tokens: int, experts: int, chosen: int, mass: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    scores_TE = 3 * torch.randn(tokens, experts)
    ours = top_experts(scores_TE, chosen, mass).sort().values
    monkeypatch.setattr(selection, "this_machine", lambda: None)
    assert torch.equal(ours, top_experts(scores_TE, chosen, mass).sort().values)


@pytest.mark.parametrize("tokens", [2, 64])
def test_a_share_that_is_no_number_leaves_nothing_out(tokens: int) -> None:
    scores_TE = torch.tensor([math.nan, 1.0, 0.0, -1.0]).expand(tokens, 4)
    assert top_experts(scores_TE, 3, 0.1).sort().values.tolist() == [[0, 1, 2]] * tokens
