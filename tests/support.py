"""Models and data that the tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from switchable.config import RunConfig, from_dict


def shared(name: str) -> Path:
    """The path of something in the folder of shared data; the test is skipped where it is not there."""
    path = Path(os.environ.get("SWITCHABLE_DATA", Path(__file__).parents[2] / "shared" / "data")) / name
    if not path.exists():
        pytest.skip(f"no {path}: set SWITCHABLE_DATA to the folder of shared data")
    return path


def offline(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a process of its own; no test has a network."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give torch this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(found: Tensor, true: Tensor) -> float:
    """Return the relative root mean square error."""
    found = found.detach()
    return float((found.double() - true.detach()).norm() / true.detach().norm().clamp_min(1e-30))


def tiny_gpt2(
    activation: str = "relu", layers: int = 2, dtype: torch.dtype = torch.float32, width: int = 16
) -> nn.Module:
    """A GPT-2 with d_model 16, d_ff 64 and random weights, the same ones each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=width, n_inner=4 * width, n_layer=layers, n_head=2,
        activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(dtype)
    with torch.no_grad():  # zero biases would hide mistakes in their treatment
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "mlp" in name:
                parameter.normal_(std=0.3)
    return model


class HomeMade(nn.Module):
    """A model of a type we do not know."""

    class MyMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(6, 24), nn.Linear(24, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HomeMade.MyMLP() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def small_run(corpus: Path, family: str = "gpt2", **train: Any) -> RunConfig:
    """A run of 20 steps with several switches and regroupings."""
    return from_dict(
        {
            "model": {"family": family, "d_model": 16, "num_layers": 2, "num_heads": 2},
            "data": {"data": [str(corpus)], "vocab_size": 400},
            "train": {
                "steps": 20, "batch_size": 4, "sequence_length": 24, "log_every": 4, "eval_every": 10,
                "checkpoint_every": 5, "keep": 0, "eval_tokens": 512, "probe_tokens": 200, "threads": 1, **train,
            },
            "switch": {
                "recipe": "early", "num_experts": 8, "experts_per_token": 3, "monitor_every": 3,
                "stability_threshold": 0.0, "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2,
                "min_dense_fraction": 0.15, "final_dense_fraction": 0.2,
            },
        }
    )  # fmt: skip


class Holder(Tensor):
    """A tensor that holds another one, and has no memory of its own; computed with, it gives plain ones."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Holder:
        made = Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own, named = tree_map_only(Holder, lambda each: each.held, (args, kwargs or {}))
        return tree_map_only(Tensor, Holder if func.is_view else lambda each: each, func(*own, **named))
