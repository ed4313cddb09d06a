"""Nothing pickled is opened: not by any verb, whatever in the folder names it."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from switchable.cli import main
from switchable.store.export import export

VERBS: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "bench": lambda model, _text, _out: ["bench", model],
    "convert": lambda model, text, out: ["convert", model, "--data", text, "--out", out, "--num-experts", 8],
    "eval": lambda model, text, _out: ["eval", model, "--data", text],
    "export": lambda model, _text, out: ["export", model, "--to", "dense", "--out", out],
    "finetune": lambda model, text, _out: ["finetune", model, "--task", "sst2", "--data", text],
    "generate": lambda model, _text, _out: ["generate", model, "--prompt", "the"],
    "study": lambda model, text, out: ["study", model, "--text", text, "--out", out],
    "series": lambda model, text, out: ["study", "--checkpoints", model, "--text", text, "--out", out],
}
WAYS = ("instead", "index", "config", "other index")
"""What makes a loader open the pickle: there is nothing else, or a file names it."""


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, creates: Path) -> None:
        self.creates = creates

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.creates), "w")


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The pickles that Python opens from now on."""
    names: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith("_model.bin") and "r" in (args[1] or "r"):
            names.append(str(args[0]))

    sys.addaudithook(hook)
    return names


def plant(model: Path, way: str, creates: Path) -> None:
    """Put a pickle into the folder of a model, and what would have it opened."""
    name = "adapter_model.bin" if way == "config" else "pytorch_model.bin"
    with (model / name).open("wb") as file:
        pickle.dump(Payload(creates), file)
    weights, config = model / "model.safetensors", model / "config.json"
    index = json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}})
    if way == "instead":
        weights.unlink()
    elif way == "index":
        weights.rename(model / "other.safetensors")
        (model / "model.safetensors.index.json").write_text(index)
    else:
        told = name if way == "config" else "x.safetensors.index.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": told}))
        (model / "x.safetensors.index.json").write_text(index)


@pytest.fixture(scope="module")
def models(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a sparse export, with their tokenizer."""
    base = tmp_path_factory.mktemp("pickles")
    for to in ("dense", "sparse"):
        export(trained("gpt2")[0], to, base / to)
    (base / "glue" / "SST-2").mkdir(parents=True)
    for part in ("train", "dev"):
        (base / "glue" / "SST-2" / f"{part}.tsv").write_text("sentence\tlabel\na cat\t1\na dog\t0\n")
    return base


def test_the_payload_works(tmp_path: Path, opened: list[str]) -> None:
    with (tmp_path / "a_model.bin").open("wb") as file:
        pickle.dump(Payload(tmp_path / "created"), file)
    with (tmp_path / "a_model.bin").open("rb") as file:
        pickle.load(file).close()
    assert (tmp_path / "created").exists()
    assert opened == [str(tmp_path / "a_model.bin")]
    opened.clear()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_opens_a_pickle(
    verb: str, way: str, models: Path, corpus: Path, tmp_path: Path, opened: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain = verb in ("convert", "series", "study")
    shutil.copytree(models / ("dense" if plain else "sparse"), tmp_path / "model")
    plant(tmp_path / "model", way, tmp_path / "created")
    text = models / "glue" if verb == "finetune" else corpus
    code = main([str(part) for part in VERBS[verb](tmp_path / "model", text, tmp_path / "out")])
    assert code == 2
    sealed = not plain and way in ("instead", "index")  # its manifest names what is not there any more
    told = "is damaged (model.safetensors is missing)" if sealed else "which we never open"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "created").exists()
    assert not (tmp_path / "out").exists()
    assert opened == []


def test_weights_beside_a_pickle_are_read_without_it(
    models: Path, tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "sparse", tmp_path / "model")
    with (tmp_path / "model" / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Payload(tmp_path / "created"), file)
    assert main(["generate", str(tmp_path / "model"), "--prompt", "the", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert not (tmp_path / "created").exists()
    assert opened == []


def test_an_adapter_beside_a_model_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "sparse", tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert main(["generate", str(tmp_path / "model"), "--prompt", "the"]) == 2
    assert "holds an adapter; merge it into its model" in capsys.readouterr().err
