"""A training loop as its owner writes it, and a model of the owner's own."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from support import tiny_gpt2
from torch import Tensor, nn

from switchable import Controller, Family, SwitchConfig, convert

CONFIG = SwitchConfig(
    num_experts=8, experts_per_token=3, monitor_every=4, monitor_growth=1.0, min_dense_fraction=0.4,
    stability_threshold=0.0, max_activation_ratio=1.0, min_mass_caught=0.0, sparse_steps=2, final_dense_fraction=0.2,
)  # fmt: skip
STEPS = 16
IDS = torch.randint(0, 61, (8, 24), generator=torch.Generator().manual_seed(5))
MODES = "ddddddssdssdsddd"


class NanoGPT(nn.Module):
    """Its input is called `idx`, and it names what it gives its FFNs."""

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(16, 64), nn.Linear(64, 16, bias=False), nn.ReLU()

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(hidden_states)))

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head, self.in_place = nn.Embedding(61, 16), nn.Linear(16, 61), in_place
        self.ffns = nn.ModuleList(NanoGPT.FFN() for _ in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for ffn in self.ffns:
            y = ffn(hidden_states=x)
            if self.in_place:
                y += x
            x = y if self.in_place else x + y
        return self.head(x)


FAMILY = Family(ffn="FFN", up="fc1", down="fc2")


class Result:
    """Losses and modes of a loop, and how often neurons moved."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes, self.moved = "", 0


def loop(call: nn.Module, part: slice = slice(None), optimizer: Any = None) -> Result:
    """Train a converted model, wrapped or not, on a part of each batch."""
    found, controller = Result(), Controller(call, IDS, STEPS, CONFIG)
    optimizer = optimizer or torch.optim.AdamW([p for p in call.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        found.modes += controller.mode[0]
        ids = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(step))[part]
        call.train()
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured = controller.step(optimizer)
        found.moved += 0 if measured is None else sum(perm is not None for perm in measured.permutations)
        found.losses.append(float(loss.detach()))
    return found


@cache
def trained_alone(dtype: torch.dtype) -> Result:
    model = tiny_gpt2(dtype=dtype)
    convert(model, CONFIG)
    found = loop(model)
    assert (found.modes, found.moved > 0) == (MODES, True)
    return found
