"""A checkpoint of a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapt.checkpoints import SIZES, Checkpoint, sparse_ffns

from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model


@pytest.fixture
def checkpoint(corpus: Path, tmp_path: Path) -> Checkpoint:
    """Writes the checkpoint of a small model with a tokenizer of its own."""

    def make_checkpoint(family: str = "gpt2", activation: str = "relu") -> Path:
        objective = {"bert": "masked", "t5": "span"}.get(family, "causal")
        texts = [path.read_text() for path in sorted(corpus.iterdir())]
        tokenizer = train_bpe(texts, 400, objective)
        tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id or 0}
        torch.manual_seed(1)
        model = sparse_ffns(build_model(family, SIZES, activation, len(tokenizer), tokens))
        folder = tmp_path / f"{family}-{activation}"
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(str(folder))
        return folder

    return make_checkpoint
