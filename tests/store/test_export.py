"""Exports: what they hold and say, that they come back bit by bit, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import inputs, make, output
from store.models import CONFIG, saved
from transformers import AutoModel, AutoModelForSequenceClassification

from switchable import InputError, convert, in_mode, set_mode
from switchable.data.tokenizers import load_tokenizer, train_bpe
from switchable.ffn.builders import build_model
from switchable.ffn.convert import layers_of
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.store.load import load
from switchable.store.pretrained import load_pretrained
from switchable.store.probe import save_probe


def test_a_sparse_export_opens_under_any_head(tmp_path: Path) -> None:
    model, batch = saved("opt", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", "sparse", tmp_path / "sparse", experts_per_token=[2, 5])
    (tmp_path / "sparse" / "README.md").write_text("# Mine")  # texts are for everyone to change
    opened, _ = load(tmp_path / "sparse")
    assert {layer.ssd.mode for layer in layers_of(opened)} == {"dense"}
    assert torch.equal(output(opened, batch), output(model, batch))
    with in_mode(model, "sparse", [2, 5]), in_mode(opened, "sparse"):
        assert torch.equal(output(opened, batch), output(model, batch))
    body, _ = load(tmp_path / "sparse", AutoModel)
    headed, _ = load(tmp_path / "sparse", AutoModelForSequenceClassification, num_labels=3)
    assert output(headed, batch).shape == (2, 3)
    for other in (body, headed):
        with in_mode(model, "sparse", [2, 5]), in_mode(other, "sparse"):
            hidden = [m(**batch, output_hidden_states=True).hidden_states[-1] for m in (model, other)]
        assert torch.equal(*hidden)


@pytest.mark.parametrize(
    ("family", "activation", "words"),
    [
        ("arcee", "relu2", "llama.cpp computes relu2 in models of type arcee, as this one does."),
        ("gpt2", "relu2", "llama.cpp has gelu_new built into models of type gpt2 and would write other text"),
        ("llama", "relu", "pretrain --family arcee"),
        ("opt", "relu", "nothing is known here"),
    ],
)
def test_an_export_says_whether_llama_cpp_honours_its_activation(
    family: str, activation: str, words: str, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "max_positions": 8}
    model = build_model(family, sizes, activation, 50, {"eos_token_id": 0})
    convert(model, CONFIG)
    save(tmp_path / "own", model)
    for to in ("dense", "sparse"):
        assert words in export(tmp_path / "own", to, tmp_path / to)["engines"]
        assert words in (tmp_path / to / "README.md").read_text()


@pytest.mark.parametrize("case", ["gpt2", "bert-classifier", "t5", "bart", "vit"])
def test_checkpoints_and_sparse_exports_come_back_bit_by_bit(tmp_path: Path, case: str) -> None:
    model, batch = saved(case, tmp_path / "checkpoint")
    set_mode(model, "sparse")
    expected = output(model, batch)
    export(tmp_path / "checkpoint", "sparse", tmp_path / "sparse")
    for folder in ("checkpoint", "sparse"):
        again, tokenizer = load(tmp_path / folder)
        assert tokenizer is None
        set_mode(again, "sparse")
        assert torch.equal(output(again, batch), expected)
    export(tmp_path / "sparse", "dense", tmp_path / "dense")
    set_mode(model, "dense")
    assert torch.equal(output(load_pretrained(tmp_path / "dense"), batch), output(model, batch))


def test_shards(tmp_path: Path) -> None:
    model, batch = saved("bert", tmp_path / "checkpoint")
    for to in ("dense", "sparse"):
        figures = export(tmp_path / "checkpoint", to, tmp_path / to, max_shard_size="10KB")
        assert figures["weight_files"] > 2
        assert (tmp_path / to / "model.safetensors.index.json").is_file()
    assert torch.equal(output(load_pretrained(tmp_path / "dense"), batch), output(model, batch))
    again, _ = load(tmp_path / "sparse")
    set_mode(again, "sparse")
    set_mode(model, "sparse")
    assert torch.equal(output(again, batch), output(model, batch))


def test_bad_input_is_told_and_damages_nothing(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "checkpoint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    with pytest.raises(InputError, match="does not hold a model; choose another folder"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all my work"
    export(tmp_path / "checkpoint", "dense", tmp_path / "dense")
    with pytest.raises(InputError, match="replace it with --overwrite"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "dense")
    with pytest.raises(InputError, match=r"is .*checkpoint, which is read"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "checkpoint", overwrite=True)
    with pytest.raises(InputError, match="max_shard_size='big' is not a size"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "x", max_shard_size="big")
    with pytest.raises(InputError, match="experts_per_token=9 is out of range"):
        export(tmp_path / "checkpoint", "sparse", tmp_path / "x", experts_per_token=9)
    with pytest.raises(InputError, match="has 3 values for 2 FFNs"):
        export(tmp_path / "checkpoint", "sparse", tmp_path / "x", experts_per_token=[1, 2, 3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "dense", "mine"]


def test_the_lines_of_the_readme_open_each_folder(tmp_path: Path) -> None:
    """As they stand, each from the folder that the exported one lies in."""
    model = make("gpt2")
    model.resize_token_embeddings(257)
    convert(model, CONFIG)
    save(tmp_path / "own", model, tokenizer=train_bpe(["the cat sat on a mat " * 9], 257))
    for to in ("dense", "sparse"):
        export(tmp_path / "own", to, tmp_path / to)
    for layer in layers_of(model):
        layer.ssd.takes_part = False
    save(tmp_path / "never", model, tokenizer=load_tokenizer(tmp_path / "own"))
    del model
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for folder, mode in (("dense", None), ("sparse", "sparse"), ("own", "sparse"), ("never", "dense")):
            text = (tmp_path / folder / "README.md").read_text()
            lines = text.partition("```python\n")[2].partition("```")[0]
            assert len(lines.splitlines()) == 3
            assert str(tmp_path) not in text
            assert "Its FFNs compute relu, as config.json says." in text
            found: dict[str, Any] = {}
            exec(lines, found)
            assert [layer.ssd.mode for layer in layers_of(found["model"])] == [mode] * 2 * (mode is not None)
            assert len(found["tokenizer"]) == 257
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_may_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        saved("gpt2", tmp_path / "own")
        export(tmp_path / "own", "dense", tmp_path / "dense", max_shard_size="10KB")
        save_probe(tmp_path / "probe", [inputs("gpt2")])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        (path.name for path in files), mode
    )
