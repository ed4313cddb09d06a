"""What is kept, measured or reported as good is finite: a model that diverged never counts as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_run, tiny_gpt2
from torch import nn

from switchable import InputError, SwitchConfig, convert, load
from switchable.cli import main
from switchable.files import as_json
from switchable.finite import not_finite
from switchable.store import checkpoint, folders
from switchable.store.pretrained import save_plain
from switchable.store.rundir import RunDir
from switchable.train import loop
from switchable.train.pretrain import pretrain, resume

NAN, INF = float("nan"), float("inf")


def strict(text: str) -> Any:
    """The value of a JSON text, which must be JSON: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def poisoned_run(monkeypatch: pytest.MonkeyPatch, corpus: Path, folder: Path, step: int, **train: Any) -> str:
    """Train with a gradient that is NaN in one step (counted from 1); return the error."""
    clip = loop.clip_gradients
    calls = iter(range(1, 1000))

    def poison(optimizer: torch.optim.Optimizer, largest_norm: float) -> None:
        clip(optimizer, largest_norm)
        if next(calls) == step:
            gradient = optimizer.param_groups[0]["params"][0].grad
            assert gradient is not None
            gradient[0, 0] = NAN

    monkeypatch.setattr(loop, "clip_gradients", poison)
    with pytest.raises(InputError) as error:
        pretrain(small_run(corpus, **train), folder / "run", folder / "cache", quiet=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("step", "last", "train"),
    [
        (10, 5, {"eval_every": 0, "snapshots": 0}),  # saved
        (20, 15, {}),  # the last: validated, saved, exported
        (9, 5, {"snapshots": 0}),  # measured
        (7, 5, {"eval_every": 7}),  # validated
        (11, 10, {"snapshots": 0}),  # nothing but a step: the next one has a loss of NaN
    ],
    ids=["saved", "last", "measured", "validated", "unseen"],
)
def test_a_gradient_that_becomes_nan_is_never_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, last: int, train: dict[str, Any]
) -> None:
    said = poisoned_run(monkeypatch, corpus, tmp_path, step, keep=1, **train)
    run = RunDir(tmp_path / "run")
    assert f"the last good checkpoint is {run.checkpoint(last)}" in said
    assert run.steps() == [last]
    for file in run.path.rglob("*.safetensors"):
        assert not_finite(load_file(file)) is None, file
    for line in run.metrics.read_text().splitlines():
        strict(line)
    assert not run.final.exists()
    assert not run.summary.exists()


def test_a_moment_that_overflows_is_never_saved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = loop.clip_gradients

    def large(optimizer: torch.optim.Optimizer, largest_norm: float) -> None:
        clip(optimizer, largest_norm)
        gradient = optimizer.param_groups[0]["params"][0].grad
        assert gradient is not None
        gradient[0, 0] = 1e30  # its square is infinite in float32, and the step that follows from it is 0

    monkeypatch.setattr(loop, "clip_gradients", large)
    with pytest.raises(InputError, match=r"optimizer:\S+:exp_avg_sq holds inf .* nothing was saved yet"):
        pretrain(small_run(corpus), tmp_path / "run", tmp_path / "cache", quiet=True)


def poison_file(folder: Path, file: str = "model.safetensors", value: float = NAN) -> str:
    """Put one number that is not finite into a checkpoint, and give it the checksums of it; return the tensor."""
    tensors = load_file(folder / file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point())
    tensors[name][0, 0] = value
    save_file(tensors, folder / file, {"format": "pt"})
    if (folder / folders.MANIFEST).exists():
        paths = [path for path in folder.iterdir() if path.name != folders.MANIFEST]
        folders.seal(folder, {path.name: folders.entry(path) for path in paths})
    return name


def test_a_stored_checkpoint_with_nan_is_named_wherever_it_is_opened(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    pretrain(small_run(corpus, steps=10), run.path, tmp_path / "cache", quiet=True)
    tensors = [poison_file(run.final), poison_file(run.checkpoint(10), "training.tensors", INF)]
    with pytest.raises(InputError, match=rf"final is damaged \({tensors[0]} holds nan \(1 of"):
        load(run.path)
    for verb in (
        ["generate", str(run.path)],
        ["export", str(run.path), "--to", "dense", "--out", str(tmp_path / "x")],
    ):
        assert main(verb) == 2
        assert f"{tensors[0]} holds nan" in capsys.readouterr().err
    with pytest.raises(InputError, match=rf"{tensors[1]} holds inf .* --resume-from step-000005"):
        resume(run.path, {}, tmp_path / "cache", quiet=True)
    resume(run.path, {}, tmp_path / "cache", "step-000005", quiet=True)
    load(run.path)  # the resumed run has replaced what was bad


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_convert_names_the_tensor(name: str) -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = NAN
    with pytest.raises(InputError, match=rf"{name} holds nan \(1 of"):
        convert(model, SwitchConfig(num_experts=8, experts_per_token=3))


def test_the_verb_convert_names_the_tensor(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    name = poison_file(tmp_path / "model")
    sizes = ["--num-experts", "8", "--sequence-length", "16"]
    code = main(
        ["convert", str(tmp_path / "model"), "--data", str(corpus), "--out", str(tmp_path / "out"), *sizes]
    )
    assert code == 2
    assert f"{name} holds nan (1 of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_diverged_is_not_written(tmp_path: Path, switchable_gpt2: nn.Module) -> None:
    with torch.no_grad():
        next(switchable_gpt2.parameters())[0, 0] = INF
    with pytest.raises(InputError, match="holds inf"):
        checkpoint.save(tmp_path / "out", switchable_gpt2)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds inf"):
        save_plain(tmp_path / "folder", switchable_gpt2)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_counted(dtype: torch.dtype) -> None:
    good = torch.ones(3, 4, dtype=dtype)
    bad = good.clone()
    bad[0, 0], bad[1, 1] = NAN, INF
    others = {"whole": torch.zeros(3, dtype=torch.int64), "empty": torch.empty(0, dtype=dtype)}
    assert not_finite({"good": good, **others}) is None
    assert not_finite({"good": good, "bad": bad}) == "bad holds nan (2 of 12 numbers)"
    assert not_finite(others) is None


def test_json_has_no_nan() -> None:
    value = {"a": [1.5, NAN, (INF, -INF)], "b": {"c": NAN}, "d": 10**20, "e": None, "f": True, "g": "nan"}
    assert strict(as_json(value)) == {
        "a": [1.5, None, [None, None]], "b": {"c": None}, "d": 10**20, "e": None, "f": True, "g": "nan",
    }  # fmt: skip
