"""A GPT, a BERT and a T5 from text to their end: switches, bitwise resume, plain export, blanks filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import small_run
from train.test_loop import in_two_parts

from switchable import InputError, set_mode
from switchable.ffn.convert import layers_of
from switchable.infer.generate import write
from switchable.infer.loss import validation_loss
from switchable.infer.sampling import Sampling
from switchable.store.load import load
from switchable.train.setup import set_up

Runs = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize(("family", "layers"), [("gpt2", 2), ("bert", 2), ("t5", 4)])
def test_it_switches_and_reports(trained: Runs, family: str, layers: int) -> None:
    _, figures = trained(family)
    assert figures["sparse_layers"] == [1] * layers  # of a T5 two in the encoder and two in the decoder
    assert figures["switches"] == 10
    assert figures["sparse_fraction"] == 0.45
    assert figures["val_loss_dense"] > 0
    assert figures["val_loss_sparse"] > 0
    # Only of a causal model does the loss say how many bits a byte of text takes.
    units = {"gpt2": "nats per token", "bert": "nats per masked token", "t5": "nats per token of the spans"}
    assert figures["loss_unit"] == units[family]
    assert (figures["bits_per_byte_dense"] is None) == (family != "gpt2")
    assert (figures["bits_per_byte_sparse"] is None) == (family != "gpt2")


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_twenty_steps_equal_ten_and_resume_and_ten(
    trained: Runs, family: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two_parts(small_run(corpus, family), tmp_path, monkeypatch)
    whole, _ = trained(family)
    for file in ("model.safetensors", "switchable.tensors", "training.tensors"):
        expected, found = (load_file(r / "checkpoints/step-000020" / file) for r in (whole, tmp_path / "run"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize(
    ("family", "auto"), [("bert", "AutoModelForMaskedLM"), ("t5", "AutoModelForSeq2SeqLM")]
)
def test_the_export_is_a_plain_model(trained: Runs, family: str, auto: str, corpus: Path) -> None:
    """Plain transformers has the validation loss that the summary reports; ours has the one of sparse mode."""
    folder, figures = trained(family)
    validation = set_up(small_run(corpus, family), folder.parent / "cache", quiet=True).validation
    plain = getattr(transformers, auto).from_pretrained(folder / "final").eval()
    with torch.no_grad():
        counts = [int((batch["labels"] != -100).sum()) for batch in validation]
        losses = [float(plain(**batch).loss) for batch in validation]
    by_hand = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    assert figures["val_loss_dense"] == pytest.approx(by_hand, rel=1e-5)
    model, _ = load(folder)
    set_mode(model, "sparse")
    assert figures["val_loss_sparse"] == pytest.approx(validation_loss(model, validation), rel=1e-5)


def test_only_chosen_tokens_are_predicted(corpus: Path, tmp_path: Path) -> None:
    job = set_up(small_run(corpus, "bert"), tmp_path, quiet=True)
    batch = job.batch(0)
    chosen = batch["labels"] != -100
    # [CLS] and [SEP] around 22 tokens of text, among them an end of text at times: 15 % are 3.
    assert batch["input_ids"].shape == (4, 24)
    assert (chosen.sum(1) == 3).all()
    with torch.no_grad():
        logits = job.model(input_ids=batch["input_ids"]).logits
        expected = torch.nn.functional.cross_entropy(logits[chosen], batch["labels"][chosen])
        assert float(job.model(**batch).loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_decoder_is_measured_on_its_own_inputs(corpus: Path, tmp_path: Path) -> None:
    job = set_up(small_run(corpus, "t5"), tmp_path, quiet=True)
    assert job.batch(0)["input_ids"].shape == (4, 24)
    assert job.batch(0)["labels"].shape == (4, 6)  # 4 tokens in 1 span of 26 tokens of text, and two more
    probe = job.controller.probe
    assert all("labels" not in batch for batch in probe)
    for batch, validation in zip(probe, job.validation, strict=False):
        shifted = batch["decoder_input_ids"]
        assert (shifted[:, 0] == job.model.config.decoder_start_token_id).all()
        assert torch.equal(shifted[:, 1:], validation["labels"][:, :-1])


def test_models_that_fill_blanks(trained: Runs) -> None:
    greedy = Sampling(max_new_tokens=8, temperature=0)
    bert, tokenizer = load(trained("bert")[0])
    assert tokenizer is not None
    for mode in ("dense", "sparse"):
        text = write(bert, tokenizer, "the <mask> sat", mode, sampling=greedy).text
        assert text.startswith("the ")
        assert text.endswith(" sat")
        assert "<mask>" not in text
    drawn = {write(bert, tokenizer, "the <mask>", sampling=Sampling(seed=seed)).text for seed in range(8)}
    assert len(drawn) > 1
    with pytest.raises(InputError, match="put <mask> into the prompt"):
        write(bert, tokenizer, "the cat")
    with pytest.raises(InputError, match="24 positions"):
        write(bert, tokenizer, "<mask> cat" * 20)
    t5, tokenizer = load(trained("t5")[0])
    assert tokenizer is not None
    assert len(layers_of(t5)) == 4
    for mode in ("dense", "sparse"):
        text = write(t5, tokenizer, "the <extra_id_0> sat", mode, sampling=greedy).text
        assert text.startswith("the ")
        assert text.endswith(" sat")
        assert write(t5, tokenizer, "the cat", mode, sampling=greedy).text.startswith("the cat")


@pytest.mark.parametrize(
    ("family", "mask", "most"), [("gpt2", "", 23), ("bert", "<mask>", 24), ("t5", "", 60)]
)
def test_a_sample_for_which_there_is_no_room_is_refused_before_training(
    corpus: Path, tmp_path: Path, family: str, mask: str, most: int
) -> None:
    tokenizer = set_up(small_run(corpus, family), tmp_path, quiet=True).tokenizer
    prompts = {len(tokenizer(f"{mask}{'!' * n}")["input_ids"]): f"{mask}{'!' * n}" for n in range(1, 62)}
    set_up(small_run(corpus, family, sample_prompt=prompts[most]), tmp_path, quiet=True)
    if family == "t5":  # its positions are relative
        return
    with pytest.raises(
        InputError, match=rf"has {most + 1} tokens and the model 24 positions.* at most {most} tokens"
    ):
        set_up(small_run(corpus, family, sample_prompt=prompts[most + 1]), tmp_path, quiet=True)


def test_a_sample_without_a_blank_is_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    config = small_run(corpus, "bert", sample_prompt="the cat")
    with pytest.raises(InputError, match="put <mask> into the prompt"):
        set_up(config, tmp_path, quiet=True)
