"""Ranks find those of their own attempt in a store that still holds the words of another."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from switchable.train.meeting import agree


@pytest.fixture
def store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    return store


def attempt(store: dist.Store, order: list[int]) -> set[str]:
    """All ranks meet, in the order given, half a second apart."""
    with ThreadPoolExecutor(len(order)) as pool:
        found = []
        for rank in order:
            found.append(pool.submit(agree, store, rank, len(order), 20.0))
            time.sleep(0.5)
        return {name.result() for name in found}


def test_every_attempt_has_a_name_of_its_own_whoever_comes_first(store: dist.Store) -> None:
    names = [attempt(store, order) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2])]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_an_attempt_that_died_before_it_met_does_not_mislead(store: dist.Store) -> None:
    with pytest.raises(RuntimeError):
        agree(store, 0, 3, 0.3)  # announces a name, and nobody comes
    with pytest.raises(RuntimeError, match=r"rank 1 had no answer from rank 0 within 0.5 s"):
        agree(store, 1, 3, 0.5)
    assert len(attempt(store, [1, 2, 0])) == 1


def test_one_rank_meets_itself(store: dist.Store) -> None:
    assert agree(store, 0, 1, 1.0)
