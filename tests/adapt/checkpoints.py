"""Checkpoints of small models, some of them sparse, and the verb that converts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from switchable.cli import main

SIZES = {"d_model": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "max_positions": 32}
SMALL = [
    "--num-experts", "8", "--sequence-length", "32", "--structure-tokens", "1024", "--calibration-tokens", "4096",
    "--eval-tokens", "1024", "--threads", "1", "--quiet",
]  # fmt: skip
Checkpoint = Callable[..., Path]


def sparse_ffns(model: nn.Module) -> nn.Module:
    """Make about a tenth of the activations non-zero, on inputs of about unit size."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_fc.weight", "intermediate.dense.weight", "wi.weight", "wi_0.weight")):
                parameter.normal_(std=0.3)
            if name.endswith(("c_fc.bias", "intermediate.dense.bias")):
                parameter.fill_(-1.5)
            if name.endswith(("c_proj.weight", "output.dense.weight", "wo.weight")):
                parameter.normal_(std=0.2)
    return model


def ids_for(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(10, model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def converted(folder: Path, corpus: Path, tmp_path: Path, *flags: str) -> int:
    out = tmp_path / "out"
    cache = tmp_path / "cache"
    return main(
        [
            "convert",
            str(folder),
            "--data",
            str(corpus),
            "--out",
            str(out),
            "--cache",
            str(cache),
            *SMALL,
            *flags,
        ]
    )
