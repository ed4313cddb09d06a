"""Fine-tuning learns what can be learned, dense and sparse, and keeps the model switchable."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import make
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from switchable import InputError, progress, set_mode
from switchable.cli import main
from switchable.data.glue import Example
from switchable.data.tokenizers import train_bpe
from switchable.ffn.convert import layers_of
from switchable.ffn.layer import SwitchableFFN
from switchable.finetune.classify import _encode, finetune, load_classifier
from switchable.finetune.config import FinetuneConfig
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.store.load import load

Runs = Callable[[str], tuple[Path, dict[str, Any]]]

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("default")  # accelerate's own warnings are not ours to mend


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that one word decides: a text with a fish in it is good."""
    folder = tmp_path_factory.mktemp("glue")
    generator = torch.Generator().manual_seed(0)
    words = ["the", "cat", "sat", "on", "mat", "dog", "hill"]
    for split, count in (("train", 256), ("dev", 64)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            picks = torch.randint(0, len(words), (4,), generator=generator).tolist()
            text = [words[p] for p in picks]
            if i % 2:
                text[i // 2 % 4] = "fish"
            lines.append(f"{' '.join(text)}\t{i % 2}")
        (folder / "SST-2").mkdir(exist_ok=True)
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def learn(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig("sst2", epochs=8, batch_size=16, learning_rate=5e-3, threads=1, **settings)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_bert_learns(trained: Runs, glue: Path, mode: str, tmp_path: Path) -> None:
    config = learn(mode=mode, experts_per_token=4)
    scores, result = finetune(trained("bert")[0], glue, config, tmp_path / "out", quiet=True)
    assert [(str(s.way), s.metric, s.examples) for s in scores] == [
        ("dense", "accuracy", 64), ("dense", "matthews", 64),
        ("sparse K=4", "accuracy", 64), ("sparse K=4", "matthews", 64),
        *([("sparse K=3", "accuracy", 64), ("sparse K=3", "matthews", 64)] if mode == "dense" else []),  # its own K
    ]  # fmt: skip
    trained_way = "dense" if mode == "dense" else "sparse K=4"
    assert result["trained"] == trained_way
    assert next(s.value for s in scores if str(s.way) == trained_way) >= 0.9
    assert json.loads((tmp_path / "out/results.json").read_text()) == result
    # What was saved is a plain classifier, and ours is the same in dense mode and still switchable.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    model, tokenizer = load(tmp_path / "out")
    assert tokenizer is not None
    inputs = tokenizer(["the cat sat", "the fish sat"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits)
        dense = model(**inputs).logits
        set_mode(model, "sparse", 1)
        assert not torch.equal(model(**inputs).logits, dense)


def test_a_model_in_half_precision_learns_in_float32(trained: Runs, glue: Path, tmp_path: Path) -> None:
    """To what the same weights learn that were written in float32, rounded once; the file is as it was."""
    model, tokenizer = load(trained("bert")[0])
    found = {}
    for name, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
        save(tmp_path / name, model.to(torch.bfloat16).to(dtype), tokenizer=tokenizer)
        config = FinetuneConfig("sst2", epochs=0.2, batch_size=16, learning_rate=1e-4, threads=1)
        finetune(tmp_path / name, glue, config, tmp_path / f"{name}-out", quiet=True)
        found[name] = load_file(tmp_path / f"{name}-out" / "model.safetensors")
    for name, tensor in found["half"].items():
        assert tensor.dtype == torch.bfloat16
        if "intermediate" in name:  # learned little with 1e-4: much of it would be rounded away in bfloat16
            torch.testing.assert_close(tensor.float(), found["single"][name], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_it_multiplies_in_the_precision_that_it_says(
    trained: Runs, glue: Path, monkeypatch: pytest.MonkeyPatch, precision: str | None
) -> None:
    seen, forward = set(), SwitchableFFN.forward

    def noting(layer: SwitchableFFN, x: torch.Tensor) -> torch.Tensor:
        seen.add((layer.training, torch.is_autocast_enabled("cpu")))
        return forward(layer, x)

    monkeypatch.setattr(SwitchableFFN, "forward", noting)
    config = FinetuneConfig("sst2", max_train_examples=32, epochs=1, threads=1, precision=precision)
    _, result = finetune(trained("bert")[0], glue, config, quiet=True)
    assert result["precision"] == (precision or "float32")
    assert seen == {(True, precision == "bfloat16"), (False, precision == "bfloat16")}


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_classifier_has_the_body_and_the_routers_of_the_run(trained: Runs, family: str) -> None:
    folder, _ = trained(family)
    body, _ = load(folder)
    classifier, tokenizer = load_classifier(folder, 2)
    assert tokenizer.pad_token_id is not None
    pairs = list(zip(layers_of(body), layers_of(classifier), strict=True))
    assert len(pairs) == (4 if family == "t5" else 2)
    for ours, new in pairs:
        assert torch.equal(ours.router.weight, new.router.weight)
        assert torch.equal(ours.ssd.up_projection.weight, new.ssd.up_projection.weight)
        assert (new.ssd.experts_per_token, new.ssd.takes_part, new.ssd.router_learns) == (3, True, True)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families_learn_too(trained: Runs, glue: Path, family: str) -> None:
    scores, _ = finetune(trained(family)[0], glue, learn(), quiet=True)
    assert scores[0].value >= 0.9


def test_a_sparse_export_is_fine_tuned_as_its_run(trained: Runs, tmp_path: Path) -> None:
    export(trained("t5")[0], "sparse", tmp_path / "sparse")
    found = [load_classifier(folder, 2)[0] for folder in (trained("t5")[0], tmp_path / "sparse")]
    assert len(layers_of(found[0])) == 4
    for of_run, exported in zip(*map(layers_of, found), strict=True):
        assert torch.equal(of_run.router.weight, exported.router.weight)
        assert torch.equal(of_run.ssd.neuron_ids_F, exported.ssd.neuron_ids_F)
        assert of_run.ssd.takes_part == exported.ssd.takes_part


def test_the_command(trained: Runs, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = trained("bert")[0], tmp_path / "out"
    command = [
        "finetune", str(folder), "--task", "sst2", "--data", str(glue), "--out", str(out), "--epochs", "1",
        "--max-train-examples", "32", "--threads", "1", "--quiet",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["task", "metric", "examples", "dense", "sparse", "K=3"]
    result = json.loads(printed[-1])
    assert result["train_examples"] == 32
    assert main(command) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert main(["eval", str(out), "--data", str(glue)]) == 2
    assert "BertForSequenceClassification, which predicts no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--task": "sst"}, ["'sst' is not known", "did you mean 'sst2'?"]),
        ({"--task": "rte"}, ["no train.tsv of rte"]),
        ({"--data": "nowhere"}, ["no train.tsv of sst2 in nowhere"]),
        ({"--epochs": "0"}, ["epochs=0"]),
        ({"--batch-size": "0"}, ["batch_size=0"]),
        ({"--mode": "sparse", "--experts-per-token": "9"}, ["experts_per_token=9", "from 1 to 8"]),
        ({"--mode": "dense", "--experts-per-token": "9"}, ["experts_per_token=9", "from 1 to 8"]),
    ],
)
def test_wrong_requests(
    trained: Runs, glue: Path, changed: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--task": "sst2", "--data": str(glue)} | changed
    assert (
        main(["finetune", str(trained("bert")[0]), *(part for pair in given.items() for part in pair)]) == 2
    )
    said = capsys.readouterr().err
    assert "examples to train on" not in said
    for word in words:
        assert word in said


def test_what_it_says_and_that_it_is_not_silent(
    trained: Runs,
    glue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = trained("bert")[0], tmp_path / "out"
    capsys.readouterr()
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    given = ["--data", str(glue), "--epochs", "1", "--max-train-examples", "32", "--threads", "1"]
    assert main(["finetune", str(run), "--task", "sst2", *given, "--out", str(out)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        f"sst2: 32 examples to train on, 64 to score; {run} under a new head, trained dense for 1 epochs "
        f"in float32 on cpu; writes to {out}"
    )
    assert said[-2] == f"saved in {out}: the classifier, and results.json"
    opens = f'import transformers; transformers.BertForSequenceClassification.from_pretrained("{out}")'
    assert said[-1] == f"next: python -c '{opens}'"
    for name in ("fine-tuning:", "scoring:"):
        assert any(line.startswith(name) for line in said)


def test_without_accelerate(trained: Runs, glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    with pytest.raises(InputError, match=r"pip install 'switchable\[finetune\]'"):
        finetune(trained("bert")[0], glue, learn())


def test_texts_are_cut_to_what_the_model_can_take() -> None:
    model = make("roberta")  # its config says 40 positions, of which the padding token's id takes 3
    tokenizer = train_bpe(["the cat sat on a mat"], 400, "masked")
    long = "the cat " * 100
    for texts, least in (((long,), 3), ((long, "sat on a mat"), 5)):
        example = Example(texts, 1)
        (cut,) = _encode([example], tokenizer, model, 500)
        assert len(cut["input_ids"]) == 37
        model(input_ids=torch.full((1, 37), 5))
        assert len(_encode([example], tokenizer, model, least)[0]["input_ids"]) == least
        with pytest.raises(
            InputError, match=f"max_length={least - 1} leaves no room for a text; use at least {least}"
        ):
            _encode([example], tokenizer, model, least - 1)
