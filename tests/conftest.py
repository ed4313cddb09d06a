"""Small models and text that the tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_run, tiny_gpt2
from torch import nn

from switchable import SwitchConfig, convert
from switchable.train.pretrain import pretrain


def pytest_configure() -> None:
    """One thread, here and in the processes that tests start, whatever the user has set: some compare bits.

    What depends on threads is tested with numbers of its own. Nothing asks a network.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays: the collector of garbage need not look through it, 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_gpt2() -> Callable[..., nn.Module]:
    return tiny_gpt2


@pytest.fixture
def switchable_gpt2() -> nn.Module:
    model = tiny_gpt2()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "dog", "run", "over", "the",
        "hill", "to", "find", "some", "fish",
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        picks = torch.randint(0, len(words), (300,), generator=generator).tolist()
        (folder / f"{i:03d}.txt").write_text(" ".join(words[p] for p in picks), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A finished run of 20 steps per family, made when first asked for: its folder and its summary."""
    base = tmp_path_factory.mktemp("runs")
    done: dict[str, dict[str, Any]] = {}

    def run(family: str) -> tuple[Path, dict[str, Any]]:
        if family not in done:
            done[family] = pretrain(small_run(corpus, family), base / family, base / "cache", quiet=True)
        return base / family, done[family]

    return run
