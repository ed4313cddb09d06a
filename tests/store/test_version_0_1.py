"""A run that version 0.1 wrote, stopped at step 8 of 12: it opens, and resumes to the figures that 0.1 came to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from switchable.config import read_stored
from switchable.ffn.convert import layers_of, set_mode
from switchable.store.load import load
from switchable.train.pretrain import resume

RUN = Path(__file__).parent / "run-0.1"
FINAL = {"val_loss_dense": 5.486050923665364, "val_loss_sparse": 5.48606522878011}
"""What 0.1 had measured at the end of this run."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run; its text is found from the working directory."""
    shutil.copytree(RUN, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def test_its_model_opens_in_both_modes(run: Path) -> None:
    model, tokenizer = load(run)
    assert tokenizer is None
    ids = torch.arange(8)[None]
    logits = {}
    for mode in ("dense", "sparse"):
        set_mode(model, mode)
        logits[mode] = model(input_ids=ids).logits
    assert [layer.ssd.experts_per_token for layer in layers_of(model)] == [2, 2]
    assert not torch.equal(logits["dense"], logits["sparse"])


def test_its_configuration_is_read(run: Path) -> None:
    config = read_stored(run / "config.yaml")
    assert (config.switch.recipe, config.switch.num_experts, config.switch.sparse_steps) == ("early", 4, 2)
    assert config.train.probe_tokens == 64


def test_it_resumes_to_the_same_figures(run: Path, tmp_path: Path) -> None:
    figures = resume(run, {}, tmp_path / "cache", quiet=True)
    assert {key: figures[key] for key in FINAL} == pytest.approx(FINAL, abs=1e-6)
    assert (figures["steps"], figures["sparse_fraction"], figures["switches"]) == (12, 7 / 12, 8)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 12
