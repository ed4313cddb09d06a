"""Two hundred steps in bfloat16: sparse with all experts on learns what dense learns."""

from __future__ import annotations

import pytest
import torch
from support import tiny_gpt2

from switchable import SwitchConfig, convert, set_mode
from switchable.ffn.convert import layers_of

STEPS = 200


def losses(mode: str, backend: str) -> list[float]:
    """Losses of a tiny GPT-2 that learns a text of 2 sequences by heart, under autocast."""
    model = tiny_gpt2(layers=1, width=64).train()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=8, backend=backend))
    for layer in layers_of(model):
        layer.ssd.router_learns = False
    set_mode(model, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids_BS = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def dense() -> list[float]:
    return losses("dense", "auto")


def test_all_experts_learn_what_dense_learns(dense: list[float]) -> None:
    sparse = losses("sparse", "fused")
    assert dense[-1] < dense[0] / 3
    assert sparse != dense  # they were multiplied in another way
    # A step rounds to 8 bits, 1 in 256; errors of single steps are random, and of 200 some ten add up.
    assert sparse == pytest.approx(dense, rel=10 / 256)
