"""Golden losses across one switch: a change that should not alter numerics leaves `golden_losses.json` untouched.

In float64 and single-threaded, so that another machine's rounding does not show. A change that *should* alter them
writes the file anew (`python tests/train/test_golden.py`) and says why in docs/log.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import tiny_gpt2

from switchable import Controller, SwitchConfig, convert

GOLDEN = Path(__file__).with_name("golden_losses.json")


def losses_across_a_switch() -> list[float]:
    model = tiny_gpt2(dtype=torch.float64)
    config = SwitchConfig(
        num_experts=8, experts_per_token=2, monitor_every=4, min_dense_fraction=0.2, stability_threshold=0.0,
        max_activation_ratio=1.0, min_mass_caught=0.0, sparse_steps=2, final_dense_fraction=0.2, backend="reference",
    )  # fmt: skip
    convert(model, config)
    generator = torch.Generator().manual_seed(7)
    batches = torch.randint(0, 61, (20, 4, 24), generator=generator)
    controller = Controller(model, batches[0], total_steps=20, config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step(optimizer)
        losses.append(loss.item())
    assert controller.switches >= 2
    return losses


def test_losses_are_golden() -> None:
    expected = json.loads(GOLDEN.read_text())
    assert losses_across_a_switch() == pytest.approx(expected, rel=1e-9)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(losses_across_a_switch(), indent=1) + "\n")
