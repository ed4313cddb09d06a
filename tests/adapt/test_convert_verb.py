"""`switchable convert`: the dense function stays, what is told is true, and what cannot be converted is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapt.checkpoints import Checkpoint, converted, ids_for
from families.models import make

from switchable import InputError
from switchable.adapt.config import AdaptConfig
from switchable.data.tokenizers import train_bpe
from switchable.ffn.convert import layers_of
from switchable.infer.generate import write
from switchable.store.load import load, load_pretrained


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_checkpoint_becomes_switchable(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder = checkpoint(family)
    flags = ["--max-activation-ratio", "1.0"] if family == "t5" else []
    assert converted(folder, corpus, tmp_path, *flags) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["ffns"] == len(figures["layers"]) == (4 if family == "t5" else 2)
    assert figures["experts_per_token"] == 2
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == figures
    plain, (model, tokenizer) = load_pretrained(folder), load(tmp_path / "out")
    batch = ids_for(plain)
    before, after = plain(**batch).logits, model(**batch).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-5
    assert tokenizer is not None
    assert [layer.ssd.experts_per_token for layer in layers_of(model)] == [2] * figures["ffns"]
    assert figures["loss_dense"] > 0
    assert set(figures["loss_sparse"]) == {"1/8", "1/4", "1/2"}
    for row in figures["layers"]:
        assert 0 < row["mass_caught"] <= row["mass_best"] <= 1
    if family == "gpt2":
        assert all(row["takes_part"] for row in figures["layers"])
        assert write(model, tokenizer, "the cat", "sparse").text.startswith("the cat")


def test_a_model_that_is_not_sparse(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("gpt2", "gelu")
    assert converted(folder, corpus, tmp_path) == 2
    message = capsys.readouterr().err
    assert "(gelu) are not sparse: in each of its 2 FFNs at least" in message
    assert all(
        part in message
        for part in ("dense ", "K/E = 1/8 ", "K/E = 1/4 ", "--relufy 1000", "--keep-activation")
    )
    assert not (tmp_path / "out").exists()
    assert converted(folder, corpus, tmp_path, "--keep-activation") == 0
    assert load(tmp_path / "out")[0].config.activation_function == "gelu"
    assert converted(folder, corpus, tmp_path, "--relufy", "6", "--overwrite") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures["relufy"]) == {"steps", "loss_before", "loss_swapped", "loss_after"}
    model, _ = load(tmp_path / "out")
    assert model.config.activation_function == "relu"
    assert layers_of(model)[0].ssd.settings.activation == "relu"


def test_bad_input(
    checkpoint: Checkpoint, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, *flags: str) -> str:
        assert converted(folder, corpus, tmp_path, *flags) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    folder = checkpoint()
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "num_experts=10 does not divide d_ff=64" in refused(folder, "--num-experts", "10")
    assert "experts_per_token=9 is not possible with num_experts=8" in refused(
        folder, "--experts-per-token", "9"
    )
    assert "structure='magic' is not known" in refused(folder, "--structure", "magic")
    assert "relu already: leave out --relufy" in refused(folder, "--relufy", "5")
    assert "give one of them" in refused(folder, "--relufy", "5", "--keep-activation")
    assert "no-such-file" in refused(folder, "--data", str(tmp_path / "no-such-file"))
    vit = tmp_path / "vit"
    make("vit").save_pretrained(vit)
    assert "ViTForImageClassification, which predicts no text" in refused(vit)
    big = train_bpe([path.read_text() for path in corpus.iterdir()], 900)
    config = json.loads((folder / "config.json").read_text())
    big.save_pretrained(str(folder))
    if len(big) > config["vocab_size"]:
        assert "they do not belong together" in refused(folder)
    make("llama").save_pretrained(tmp_path / "bare")
    assert "no tokenizer in the folder" in refused(tmp_path / "bare")


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"relufy": -1}, "relufy=-1"),
        ({"calibration_tokens": 0}, "calibration_tokens=0"),
        ({"router_learning_rate": 0.0}, "router_learning_rate"),
        ({"max_activation_ratio": 0.0}, "max_activation_ratio"),
    ):
        with pytest.raises(InputError, match=message):
            AdaptConfig(**settings)
    assert AdaptConfig(num_experts=3).default_k == 1
