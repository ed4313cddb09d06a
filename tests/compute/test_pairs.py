"""The sorted (token, expert) pairs: hand-computed orders, chunks and lanes."""

from __future__ import annotations

import pytest
import torch

from switchable.compute.cpu import pairs as module
from switchable.compute.cpu.pairs import SortedPairs


@pytest.fixture
def lanes_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_lanes", lambda _rows: 2)


def test_pairs_stand_in_the_order_of_experts_and_then_of_tokens() -> None:
    pairs = SortedPairs.sort(torch.tensor([[2, 0], [0, 3], [3, 2]]), 4)
    assert pairs.tokens_P.tolist() == [0, 1, 0, 2, 1, 2]
    assert pairs.chunks == [(0, 2, 2, True), (2, 2, 2, True), (3, 2, 2, True)]
    assert pairs.unused == [1]
    assert (pairs.lanes, pairs.most_rows) == (1, 2)


@pytest.mark.usefixtures("lanes_of_two")
def test_lanes_are_made_equal_by_repeating_the_last_token() -> None:
    pairs = SortedPairs.sort(torch.tensor([[0], [1], [0], [0], [1]]), 3)
    assert pairs.tokens_P.tolist() == [0, 2, 3, 3, 1, 4]
    assert pairs.chunks == [(0, 4, 3, True), (1, 2, 2, True)]
    assert pairs.by_lane(torch.arange(8.0).view(4, 2)).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.usefixtures("lanes_of_two")
def test_a_long_list_is_cut_and_only_its_first_chunk_starts_a_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 5)  # 4 with two lanes
    pairs = SortedPairs.sort(torch.zeros(9, 1, dtype=torch.long), 2)
    assert pairs.chunks == [(0, 4, 4, True), (0, 4, 4, False), (0, 2, 1, False)]
    assert [len(part) for part in pairs.parts(pairs.tokens_P)] == [4, 4, 2]
    assert pairs.tokens_P.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_no_token_gives_no_pair() -> None:
    pairs = SortedPairs.sort(torch.zeros(0, 3, dtype=torch.long), 4)
    assert (len(pairs.tokens_P), pairs.chunks, pairs.unused, pairs.most_rows) == (0, [], [0, 1, 2, 3], 0)


def test_lanes_are_as_many_as_threads_where_rows_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert module._lanes(4 * module.MIN_LANE_ROWS) == 4
    assert module._lanes(4 * module.MIN_LANE_ROWS - 1) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: module.MAX_LANES + 1)
    assert module._lanes(10**6) == 1
