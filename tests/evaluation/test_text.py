"""Loss on text: every token once, by hand; bits per byte; every way; masked and span models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from switchable import InputError, set_mode
from switchable.cli import main
from switchable.data.config import DataConfig
from switchable.data.objectives import CausalLM
from switchable.evaluation.config import EvalConfig
from switchable.evaluation.run import evaluate
from switchable.evaluation.text import TokenisedText, overlapping_windows, text_scores
from switchable.evaluation.ways import Way, ways
from switchable.ffn.convert import layers_of
from switchable.store.export import export

Runs = Callable[[str], tuple[Path, dict[str, Any]]]


def test_every_token_but_the_first_is_predicted_once() -> None:
    batches = list(overlapping_windows(np.arange(10, 33), sequence_length=8, batch_size=2))
    predicted = [int(t) for batch in batches for row in batch["labels"] for t in row[1:] if t != -100]
    assert predicted == list(range(11, 33))
    assert [b["input_ids"].shape for b in batches] == [(2, 8), (2, 8)]
    assert batches[1]["labels"][1].tolist() == [31, 32, *[-100] * 6]


def test_by_hand(switchable_gpt2: nn.Module) -> None:
    ids = np.random.default_rng(0).integers(0, 61, 40)
    text = TokenisedText(ids, text_bytes=100)
    found = text_scores(switchable_gpt2, text, CausalLM(12), 12, [Way("dense"), Way("sparse", 2)], 3)
    for i, (mode, k) in enumerate((("dense", 3), ("sparse", 2))):
        set_mode(switchable_gpt2, mode, k)
        windows = []
        for start in range(0, 39, 11):
            window = torch.tensor(ids[start : start + 12])[None]
            with torch.no_grad():
                log_p = switchable_gpt2.eval()(input_ids=window).logits[0, :-1].log_softmax(-1)
            windows.append([-float(row[t]) for row, t in zip(log_p, window[0, 1:], strict=True)])
        nats, n = [sum(w) for w in windows], [len(w) for w in windows]
        assert n == [11, 11, 11, 6]
        loss = sum(nats) / 39
        residuals = [a - loss * b for a, b in zip(nats, n, strict=True)]
        stderr = math.sqrt(sum(r * r for r in residuals) / 3) / (39 / 4) / 2
        one, two, three = found[3 * i : 3 * i + 3]
        assert (one.value, one.stderr) == pytest.approx((loss, stderr), rel=1e-5)
        assert (two.value, two.stderr) == pytest.approx((math.exp(loss), math.exp(loss) * stderr), rel=1e-4)
        per_byte = 39 / math.log(2) / 100
        assert (three.value, three.stderr) == pytest.approx((loss * per_byte, stderr * per_byte), rel=1e-5)
    assert layers_of(switchable_gpt2)[0].ssd.mode == "sparse"  # as it was set above


def test_ways(switchable_gpt2: nn.Module) -> None:
    assert ways(switchable_gpt2) == [Way("dense"), Way("sparse", 3)]
    assert ways(switchable_gpt2, ["sparse"], [2, 8, 2]) == [
        Way("sparse", 2),
        Way("sparse", 8),
        Way("sparse", 3),
    ]
    layers_of(switchable_gpt2)[0].ssd.experts_per_token = 5
    assert [str(way) for way in ways(switchable_gpt2)] == ["dense", "sparse K=3-5"]
    assert ways(switchable_gpt2)[1].experts_per_token == (5, 3)  # each layer has a K of its own
    with pytest.raises(InputError, match=r"experts_per_token=9 .* from 1 to 8"):
        ways(switchable_gpt2, [], [9])
    for layer in layers_of(switchable_gpt2):
        layer.ssd.takes_part = False
    assert ways(switchable_gpt2) == [Way("dense")]
    with pytest.raises(InputError, match="no sparse mode: 2 of 2 FFNs stay dense"):
        ways(switchable_gpt2, ["sparse"])


def test_ways_with_a_mass(switchable_gpt2: nn.Module) -> None:
    found = ways(switchable_gpt2, ["sparse"], [2], [0.9])
    assert found == [Way("sparse", 2), Way("sparse", 3), Way("sparse", 2, 0.9), Way("sparse", 3, 0.9)]
    assert str(found[2]) == "sparse K<=2 mass=0.9"
    set_mode(switchable_gpt2, "dense", mass=0.9)  # the model's own, which is not listed twice
    assert ways(switchable_gpt2, ["sparse"]) == [Way("sparse", 3, 0.9)]
    assert ways(switchable_gpt2, ["sparse"], [], [0.9]) == [Way("sparse", 3), Way("sparse", 3, 0.9)]


def test_without_text_it_is_the_runs_own_validation_text(trained: Runs, tmp_path: Path) -> None:
    folder, figures = trained("gpt2")
    found = evaluate(folder, EvalConfig(mode=("dense",), threads=1), DataConfig())
    loss = next(s for s in found.scores if s.metric.startswith("loss"))
    # Windows overlap here by one token, those of training do not: nearly the same predictions.
    assert loss.value == pytest.approx(figures["val_loss_dense"], abs=0.02)
    export(folder, "sparse", tmp_path / "exported")
    with pytest.raises(InputError, match="nothing to evaluate on; give text with --data"):
        evaluate(tmp_path / "exported", EvalConfig(), DataConfig())


def test_loss_against_speed(trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = trained("gpt2")
    picture = folder / "speed.png"
    assert main(["eval", str(folder), "--experts-per-token", "1", "8", "--speed", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (result["picture"], picture.read_bytes()[:4]) == (str(picture), b"\x89PNG")
    rows = {(r["mode"], r["experts_per_token"], r["mass"]): r for r in result["speed"]}
    ks = [1, 8, 3]
    assert list(rows) == [("dense", None, 1.0), *(("sparse", k, m) for m in (1.0, 0.9) for k in ks)]
    assert all(0 < r["middle"][0] <= r["tokens_per_second"] <= r["middle"][1] for r in rows.values())
    assert [rows["sparse", k, 1.0]["experts"] for k in ks] == ks
    assert rows["dense", None, 1.0]["experts"] is None
    assert 1 < rows["sparse", 8, 0.9]["experts"] < 8
    # No expert left out is the dense model; up to one expert is one expert.
    losses = {way: row["loss"] for way, row in rows.items()}
    assert losses["sparse", 8, 1.0] == pytest.approx(losses["dense", None, 1.0], rel=1e-4)
    assert losses["sparse", 1, 0.9] == losses["sparse", 1, 1.0]
    assert losses["sparse", 8, 0.9] != losses["sparse", 8, 1.0]
    assert [line.split()[:1] for line in lines if line.startswith(("dense ", "sparse "))] == [
        ["dense"],
        *[["sparse"]] * 6,
    ]
    out = tmp_path / "scores.json"
    assert main(["eval", str(folder), "--speed", "--mode", "dense", "--threads", "1", "--out", str(out)]) == 0
    assert (tmp_path / "scores-speed.png").is_file()
    assert main(["eval", str(trained("bert")[0]), "--speed"]) == 2
    assert "speed is that of writing, which this model does not" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_run_on_text(trained: Runs, family: str, corpus: Path) -> None:
    folder, figures = trained(family)
    scores = evaluate(
        folder, EvalConfig(experts_per_token=(1, 3, 8), threads=1), DataConfig((str(corpus),))
    ).scores
    losses = {str(s.way): s.value for s in scores if s.metric.startswith("loss")}
    assert list(losses) == ["dense", "sparse K=1", "sparse K=3", "sparse K=8"]
    assert losses["sparse K=8"] == pytest.approx(
        losses["dense"], rel=1e-4
    )  # all experts on is the dense layer
    # The same kind of text as the validation's: the same loss within five standard errors.
    stderr = scores[0].stderr
    assert stderr is not None
    assert losses["dense"] == pytest.approx(figures["val_loss_dense"], abs=5 * stderr + 0.05)
    unit = f"loss ({figures['loss_unit']})"
    causal = {unit, "perplexity", "bits per byte"}
    assert {s.metric for s in scores} == (causal if family == "gpt2" else {unit})


def test_a_window_that_the_model_cannot_take(trained: Runs, corpus: Path) -> None:
    folder, data = trained("gpt2")[0], DataConfig((str(corpus),))
    with pytest.raises(InputError, match="sequence_length=1 is out of range"):
        EvalConfig(sequence_length=1)
    with pytest.raises(InputError, match="sequence_length=25 is more than the 24 positions of the model"):
        evaluate(folder, EvalConfig(sequence_length=25), data)
    assert evaluate(folder, EvalConfig(sequence_length=2, mode=("dense",), threads=1), data).scores
