"""The loop as a whole: bitwise resume across switches, golden losses, and a summary whose figures add up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from switchable import InputError
from switchable.compute.cpu.llvm import this_machine
from switchable.config import RunConfig, from_dict
from switchable.train.counters import Counters
from switchable.train.loop import Trainer
from switchable.train.pretrain import pretrain, resume
from switchable.train.signals import TrainingStopped

SMALL: dict[str, Any] = {
    "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
    "data": {"vocab_size": 300},
    "train": {
        "steps": 20, "batch_size": 4, "sequence_length": 16, "log_every": 4, "eval_every": 5,
        "checkpoint_every": 5, "keep": 0, "eval_tokens": 512, "threads": 1, "probe_tokens": 256,
    },
    "switch": {
        "recipe": "early", "num_experts": 8, "experts_per_token": 3, "monitor_every": 3,
        "stability_threshold": 0.0, "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2,
        "min_dense_fraction": 0.15, "final_dense_fraction": 0.2,
    },
}  # fmt: skip


def small(corpus: Path, **changes: dict[str, Any]) -> RunConfig:
    merged = {section: values | changes.get(section, {}) for section, values in SMALL.items()}
    merged["data"]["data"] = [str(corpus)]
    return from_dict(merged)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in ("model.safetensors", "switchable.tensors", "training.tensors"):
        found |= load_file(folder / file)
    return found


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run of 20 steps with several switches and regroupings."""
    base = tmp_path_factory.mktemp("whole")
    return base / "run", pretrain(small(corpus), base / "run", base / "cache", quiet=True)


def in_two_parts(config: RunConfig, base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train ten steps, stop, resume to the end; return the figures."""
    step = Trainer._step

    def stop_at_ten(self: Trainer) -> None:
        step(self)
        if self.counters.steps == 10:
            self.stop.signum = 15

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop_at_ten)
        with pytest.raises(TrainingStopped):
            pretrain(config, base / "run", base / "cache", quiet=True)
    torch.manual_seed(123)  # what the process did meanwhile must not matter
    return resume(base / "run", {}, base / "cache", quiet=True)


def test_twenty_steps_equal_ten_and_resume_and_ten(
    whole: tuple[Path, dict[str, Any]], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 10, between two switches; bitwise the same model, moments, structures and figures."""
    figures = in_two_parts(small(corpus), tmp_path, monkeypatch)
    undisturbed, expected = (
        weights(whole[0] / "checkpoints/step-000020"),
        weights(tmp_path / "run/checkpoints/step-000020"),
    )
    assert undisturbed.keys() == expected.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, expected[name]), name
    assert whole[1]["switches"] >= 4
    for key in ("val_loss_dense", "val_loss_sparse", "flops", "sparse_fraction", "switches", "regroupings"):
        assert figures[key] == whole[1][key], key
    assert _without_clock(tmp_path / "run") == _without_clock(whole[0])


def test_a_run_goes_on_when_its_text_has_moved(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "there", "other"):
        shutil.copytree(corpus, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    config = small(Path("here"), train={"steps": 5})
    run, cache = tmp_path / "run", tmp_path / "cache"
    pretrain(config, run, cache, quiet=True)
    (tmp_path / "here").rename("away")
    assert resume(run, {}, cache)["steps"] == 5  # its tokens are in the cache
    assert "no such file or folder: 'here'" in (said := capsys.readouterr().err)
    assert f"going on with the tokens in {cache}" in said
    with pytest.raises(InputError, match="no such file or folder: 'nowhere'"):
        resume(run, {"data": ["nowhere"]}, cache, quiet=True)
    with pytest.raises(InputError, match="no such file or folder: 'here'"):
        resume(run, {}, tmp_path / "new cache", quiet=True)
    assert resume(run, {"data": [str(tmp_path / "there")]}, tmp_path / "new cache", quiet=True)["steps"] == 5
    tokenizer = str(run / "tokenizer")
    moved = {"data": ["there"], "tokenizer": tokenizer}
    assert resume(run, moved, tmp_path / "new cache", quiet=True)["steps"] == 5
    (tmp_path / "other" / "000.txt").write_text("another text", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"the text has changed since .*: \d+ documents, .* tokens; now \d+ doc"
    ):
        resume(run, moved | {"data": ["other"]}, cache, quiet=True)
    with pytest.raises(InputError, match="the text and the tokenizer have changed"):
        resume(run, {"data": ["other"]}, cache, quiet=True)


def test_muon_trains_the_blocks_through_switches_and_resumes_bitwise(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(corpus, train={"optimizer": "muon"})
    figures = pretrain(config, tmp_path / "whole", tmp_path / "cache", quiet=True)
    assert figures["switches"] >= 4
    assert figures["regroupings"] > 0
    resumed = in_two_parts(config, tmp_path, monkeypatch)
    assert [resumed[k] for k in ("val_loss_dense", "val_loss_sparse")] == [
        figures[k] for k in ("val_loss_dense", "val_loss_sparse")
    ]
    last = weights(tmp_path / "run/checkpoints/step-000020")
    assert all(
        torch.equal(t, last[n]) for n, t in weights(tmp_path / "whole/checkpoints/step-000020").items()
    )
    by_muon = {n.split(":")[-1] for n in last if "momentum_buffer" in n}
    assert by_muon
    assert not any("wte" in n or "wpe" in n or "router" in n or "bias" in n for n in by_muon)


@pytest.mark.skipif(this_machine() is None, reason="no loops for this processor")
def test_active_neurons_cost_less_change_nothing_and_resume_bitwise(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(below: float) -> RunConfig:
        return small(corpus, train={"batch_size": 32}, switch={"active_below": below})

    plain = pretrain(config(0.0), tmp_path / "plain", tmp_path / "cache", quiet=True)
    active = pretrain(config(1.0), tmp_path / "active", tmp_path / "cache", quiet=True)
    assert (plain["active_layers"], active["active_layers"]) == ([0, 0], [1, 1])
    for key in ("val_loss_dense", "val_loss_sparse"):
        assert active[key] == pytest.approx(plain[key], abs=0.01)
    # From step 3 on eight dense steps; more than half of what is saved there, whatever the share that was active.
    ffns = 2 * 12 * 16 * 64 * 32 * 16
    assert 8 * 0.2 * ffns < plain["flops"] - active["flops"] < 8 * 5 / 6 * ffns
    figures = in_two_parts(config(1.0), tmp_path, monkeypatch)
    assert figures["flops"] == active["flops"]
    whole, parts = (weights(tmp_path / run / "checkpoints/step-000020") for run in ("active", "run"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


CLOCKS = ("tokens_per_second", "train_seconds", "cpu_seconds")


def _without_clock(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def test_the_clock_of_training_survives_a_crash_and_counts_nothing_twice(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that ticks at each look: a step takes 1 s, a measurement 1 s, and both clocks together 2 s of CPU."""
    ticks, cpu = itertools.count(), itertools.count(step=2)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: next(cpu))
    monkeypatch.setattr("switchable.train.loop.time", clock)
    step = Trainer._step

    def crash_at_13(self: Trainer) -> None:
        step(self)
        if self.counters.steps == 13:
            raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", crash_at_13)
        with pytest.raises(RuntimeError, match="crash"):
            pretrain(small(corpus), tmp_path / "run", tmp_path / "cache", quiet=True, jobs=2)
    figures = resume(tmp_path / "run", {}, tmp_path / "cache", quiet=True, jobs=1)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    # Measured after steps 3, 6, 9, 12, 14 (the router chooses), 15, 18; validated after 5, 10, 15, 20.
    assert [line["train_seconds"] for line in evals] == [5 + 1, 10 + 3, 15 + 6, 20 + 7]
    assert [line["cpu_seconds"] for line in evals] == [10, 20, 30, 40]
    assert [line["tokens"] for line in evals] == [5 * 64, 10 * 64, 15 * 64, 20 * 64]
    assert (figures["wall_seconds_train"], figures["cpu_seconds_train"]) == (27, 40)
    assert figures["wall_seconds_dense"] + figures["wall_seconds_sparse"] == 20
    assert figures["wall_seconds_measure"] == 7
    assert evals[-1]["flops"] == figures["flops"]
    assert figures["ran_with"] == [{"threads": 1, "jobs": jobs, "device": "cpu"} for jobs in (2, 1)]


def test_waiting_for_a_gpu_counts_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=8)
    monkeypatch.setattr("switchable.train.loop.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr("torch.cuda.synchronize", lambda _device: None)
    counters = Counters(window_steps=4, window_sparse=3, window_seconds=1.0)
    for kind in ("cpu", "cuda"):  # on the CPU there is nothing to wait for
        run = SimpleNamespace(job=SimpleNamespace(device=torch.device(kind)), counters=counters)
        Trainer._settle(run)  # type: ignore[arg-type]
    assert (counters.seconds_sparse, counters.seconds_dense, counters.window_seconds) == (6, 2, 9)
    assert counters.train_seconds == 8


def test_the_summary_adds_up(whole: tuple[Path, dict[str, Any]]) -> None:
    run, figures = whole
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    # Steps 0 to 19: ddd, then sparse, sparse, dense in turns until step 15, then dddd.
    assert figures["sparse_fraction"] == "dddssdssdssdssdsdddd".count("s") / 20
    assert sum(4 * line["sparse_fraction"] for line in train) == pytest.approx(9)
    assert figures["switches"] == 10
    assert figures["tokens"] == 20 * 4 * 16
    assert figures["flops"] == train[-1]["flops"]
    assert figures["flops_nonembedding"] == figures["flops"] - 20 * 6 * 300 * 16 * 64
    assert figures["flops_ratio"] == pytest.approx(figures["flops"] / figures["flops_all_dense"])
    assert json.loads((run / "summary.json").read_text()) == figures
    assert (
        figures["val_loss_dense"] == [line for line in lines if line["kind"] == "eval"][-1]["val_loss_dense"]
    )


def test_a_dense_schedule_never_goes_sparse(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(corpus, switch={"recipe": "dense", "min_dense_fraction": 1.0, "monitor_growth": 1.0})
    figures = pretrain(config, tmp_path / "run", tmp_path / "cache", quiet=True)
    assert (figures["sparse_fraction"], figures["switches"], figures["regroupings"]) == (0, 0, 0)
    assert figures["val_loss_sparse"] is None
    # Six measurements of 256 tokens, a forward pass and a bit each, are all that it costs more than plain training.
    extra, step = figures["flops"] - figures["flops_all_dense"], figures["flops_all_dense"] / 20
    assert 6 * 256 / 64 * step / 3 < extra < 6 * 256 / 64 * step / 2
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    validate, validated = Trainer.validate, itertools.count()
    monkeypatch.setattr(Trainer, "validate", lambda self: (next(validated), validate(self))[1])
    again = resume(tmp_path / "run", {"sample_prompt": "the"}, tmp_path / "cache", quiet=True)
    assert again["val_loss_dense"] == figures["val_loss_dense"]
    # By all ranks together: rank 0, which alone shows a sample, must not ask again.
    assert next(validated) == 1
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines  # a finished run has nothing to add


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    config = small(corpus)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, optimizer="sgd", grad_clip=0.0)
    )
    pretrain(config, tmp_path / "fine", tmp_path / "cache", quiet=True)
    step = Trainer._step

    def poison(self: Trainer) -> None:
        if self.counters.steps == 6:
            with torch.no_grad():
                next(self.job.model.parameters()).fill_(float("nan"))
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", poison)
        with pytest.raises(
            InputError, match=r"the loss became nan .* the last good checkpoint is .*step-000005"
        ):
            pretrain(config, tmp_path / "run", tmp_path / "cache", quiet=True)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000005"]
    assert all(
        t.isfinite().all()
        for t in weights(tmp_path / "run/checkpoints/step-000005").values()
        if t.is_floating_point()
    )
