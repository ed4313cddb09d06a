"""All methods trained once, in this process: what each run did, the cut, the report, and which folders are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from switchable import InputError
from switchable.compare.methods import METHODS
from switchable.compare.report import write_report
from switchable.compare.runs import Run, differs, others_finished, runs_of
from switchable.compare.worker import train
from switchable.config import RunConfig, from_dict
from switchable.store.load import load
from switchable.store.rundir import RunDir
from switchable.train.flops import router_learning
from switchable.train.setup import set_up

GIVEN: dict[str, Any] = {
    "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
    "train": {
        "steps": 40, "batch_size": 4, "sequence_length": 16, "log_every": 1, "eval_every": 10,
        "checkpoint_every": 20, "eval_tokens": 512, "probe_tokens": 256, "threads": 1,
    },
    "switch": {
        "recipe": "early", "num_experts": 8, "experts_per_token": 3, "monitor_every": 3,
        "stability_threshold": 0.0, "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2,
        "final_dense_fraction": 0.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def config(corpus: Path) -> RunConfig:
    return from_dict(GIVEN | {"data": {"vocab_size": 300, "data": [str(corpus)]}})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(config: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A finished run of every method."""
    planned = runs_of(config, tuple(METHODS), (0,), tmp_path_factory.mktemp("compare"))
    for run in planned:
        train(run, cache, jobs=1)
    return {run.method: run for run in planned}


def records(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def modes(run: Run) -> str:
    return "".join("s" if record["sparse_fraction"] else "d" for record in records(run, "train"))


def test_every_method_starts_from_the_same_loss(trained: dict[str, Run]) -> None:
    first = {name: records(run, "train")[0]["loss"] for name, run in trained.items()}
    assert len(set(first.values()) - {first["moe"]}) == 1
    assert first["moe"] != first["dense"]  # the same weights, multiplied otherwise


def test_dense_pays_for_nothing_but_training(trained: dict[str, Run]) -> None:
    figures = trained["dense"].summary()
    assert modes(trained["dense"]) == "d" * 40
    assert figures["flops"] == figures["flops_all_dense"]
    assert figures["wall_seconds_measure"] == 0
    assert records(trained["dense"], "measure") == []


def test_when_each_method_is_sparse(trained: dict[str, Run]) -> None:
    # 10 % of 40 steps are dense in any case, and it is measured then: all begin after step 4.
    assert modes(trained["ssd"]) == "d" * 4 + "ssd" * 10 + "ss" + "d" * 4
    # The paper's: phases of 7.5 % and 2.5 % of the steps, the last 5 % dense.
    assert modes(trained["ssd-paper"]) == "d" * 4 + "sssd" * 8 + "ss" + "d" * 2
    assert modes(trained["static"]) == "d" * 4 + "s" * 36
    assert modes(trained["moe"]) == "s" * 40
    assert modes(trained["dense-active"]) == "d" * 40
    assert modes(trained["dense-then-moe"]) == "d" * 40


def test_the_papers_method_regroups_at_each_change_to_sparse(trained: dict[str, Run]) -> None:
    measured = {r["step"]: r for r in records(trained["ssd-paper"], "measure")}
    regrouped = [step for step, r in measured.items() if all(r["regrouped"])]
    # Until it begins at 4, and before the sparse phases that begin at steps 8, 12, ...
    # A structure that moves no neuron counts for none.
    assert regrouped[0] == 4
    assert set(regrouped) <= {4, 8, 12, 16, 20, 24, 28, 32, 36}
    assert all(all(r["takes_part"]) for step, r in measured.items() if step >= 4)
    static = [r["step"] for r in records(trained["static"], "measure") if any(r["regrouped"])]
    assert static == [4]


def test_a_mixture_of_experts_has_no_dense_mode_and_is_not_opened(trained: dict[str, Run]) -> None:
    run = trained["moe"]
    figures = run.summary()
    assert figures["val_loss_dense"] is None
    assert figures["bits_per_byte_dense"] is None
    assert figures["sparse_layers"] == [1, 1]
    assert figures["val_loss_sparse"] > 0
    with pytest.raises(InputError, match=r"the baseline `moe` of a comparison.*cannot be opened"):
        load(run.path)


def test_the_cut_moves_neurons_and_trains_routers_and_nothing_else(trained: dict[str, Run]) -> None:
    dense, cut = trained["dense"], trained["dense-then-moe"]
    before = load_file(dense.path / "final/model.safetensors")
    after = load_file(cut.path / "final/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".mlp.c_fc." in name or name.endswith("mlp.c_proj.weight"):
            assert not torch.equal(after[name], tensor), name
            assert torch.equal(after[name].flatten().sort().values, tensor.flatten().sort().values), name
        else:
            assert torch.equal(after[name], tensor), name
    routers = load_file(cut.path / "final/switchable.tensors")
    assert any(routers[name].abs().max() > 0 for name in routers if name.endswith("bias"))  # they began at 0
    old, new = dense.summary(), cut.summary()
    assert new["val_loss_dense"] == pytest.approx(old["val_loss_dense"], abs=1e-5)
    assert old["val_loss_sparse"] is None
    assert new["val_loss_sparse"] > new["val_loss_dense"]
    assert new["sparse_layers"] == [1, 1]


def test_the_cut_is_charged_for(trained: dict[str, Run], cache: Path) -> None:
    dense, cut = trained["dense"].summary(), trained["dense-then-moe"].summary()
    job = set_up(trained["dense-then-moe"].config, cache, quiet=True)
    step = dense["flops"] / 40
    ffn = 3 * 4 * 16 * 64 * 64
    routers = 0.0
    for layer in job.controller.layers:
        layer.ssd.router_learns = True
        routers += router_learning(layer) * 64
    # Two measurements of 256 tokens, and 5 % of 40 steps: forward, gradients of the inputs, routers.
    expected = 2 * (step + 2 * ffn / 2) / 3 * 256 / 64 + 2 * (step * 2 / 3 + routers)
    assert cut["flops"] - dense["flops"] == pytest.approx(expected)
    assert cut["wall_seconds_train"] > dense["wall_seconds_train"]
    assert cut["wall_seconds_measure"] == pytest.approx(
        cut["wall_seconds_train"] - dense["wall_seconds_train"]
    )
    evals = records(trained["dense-then-moe"], "eval")
    assert [e["step"] for e in evals] == [10, 20, 30, 40, 40]
    assert evals[-1]["flops"] == cut["flops"]


def test_a_cut_of_a_damaged_dense_run_is_refused(
    trained: dict[str, Run], cache: Path, config: RunConfig, tmp_path: Path
) -> None:
    run = runs_of(config, ("dense-then-moe",), (0,), tmp_path)[1]
    dense = RunDir(tmp_path / "dense-s0")
    (tmp_path / "dense-s0").symlink_to(
        trained["dense"].path
    )  # a finished run may be lent to another comparison
    train(run, cache, jobs=1)
    first = run.summary()["val_loss_sparse"]
    assert first == trained["dense-then-moe"].summary()["val_loss_sparse"]
    (tmp_path / "dense-s0").unlink()
    dense.final.mkdir(parents=True)
    (run.path / "summary.json").unlink()
    with pytest.raises(InputError, match=r"final is damaged \(manifest.json is missing\)"):
        train(run, cache, jobs=1)
    (run.path / "config.yaml").unlink()  # then it is not known as a run's folder
    with pytest.raises(InputError, match=r"holds no run .* but .*, which a run would replace"):
        train(run, cache, jobs=1)


def test_the_report_of_all_methods(trained: dict[str, Run]) -> None:
    out = trained["dense"].path.parent
    table = write_report(list(trained.values()), out)
    assert json.loads((out / "compare.json").read_text()) == table
    assert list(table["methods"]) == list(METHODS)
    assert table["warnings"] == []
    dense = table["methods"]["dense"]
    for figure in ("flops_ratio", "wall_ratio", "cpu_ratio", "time_to_dense_loss_ratio"):
        assert dense[figure]["mean"] == 1.0
    summary = trained["ssd"].summary()
    ssd = table["methods"]["ssd"]
    assert ssd["flops_ratio"]["mean"] == pytest.approx(summary["flops_ratio"])
    assert ssd["flops_ratio_nonembedding"]["mean"] == pytest.approx(summary["flops_ratio_nonembedding"])
    told, _, rows = (out / "compare.md").read_text().partition("\n\n")
    assert told.startswith("- dense-active against dense, seeds 0: loss ")
    assert rows.startswith("| | dense | dense-active | ssd |")
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_left_alone_and_a_begun_one_goes_on(
    trained: dict[str, Run], config: RunConfig, cache: Path, tmp_path: Path
) -> None:
    run = runs_of(config, ("ssd",), (0,), tmp_path)[0]
    train(run, cache, jobs=1)
    assert run.summary()["val_loss_sparse"] == trained["ssd"].summary()["val_loss_sparse"]
    written = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "checkpoints/step-000020/model.safetensors").write_bytes(b"not looked at")
    train(run, cache, jobs=1)
    assert (run.path / "metrics.jsonl").read_bytes() == written
    for name in ("summary.json", "curves.png"):  # died before its summary
        (run.path / name).unlink()
    train(run, cache, jobs=1)
    assert (run.path / "metrics.jsonl").read_bytes() == written
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics.jsonl is gone; remove the run's folder"):
        write_report([run], tmp_path)
    (run.path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary.json is damaged; remove it"):
        run.summary()


def test_other_settings_in_a_folder_are_refused(trained: dict[str, Run], config: RunConfig) -> None:
    out = trained["dense"].path.parent
    threads = dataclasses.replace(config.train, threads=2, keep=1, log_every=7)
    assert len(runs_of(dataclasses.replace(config, train=threads), ("dense", "ssd"), (0,), out)) == 2
    recipe = dataclasses.replace(config, switch=dataclasses.replace(config.switch, sparse_steps=3))
    assert len(runs_of(recipe, ("dense", "moe", "ssd-paper"), (0,), out)) == 3
    with pytest.raises(
        InputError, match=r"ssd-s0 was trained with other settings \(switch.sparse_steps: 2 -> 3\)"
    ):
        runs_of(recipe, ("dense", "ssd"), (0,), out)
    often = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=5))
    with pytest.raises(
        InputError, match=r"dense-s0 was trained with other settings \(train.eval_every: 10 -> 5\)"
    ):
        runs_of(often, ("dense",), (0,), out)
    wrong = dataclasses.replace(config, switch=dataclasses.replace(config.switch, num_experts=7))
    with pytest.raises(InputError, match="num_experts=7 does not divide d_ff=64"):
        runs_of(wrong, ("ssd",), (1,), out)


def test_the_table_takes_in_what_is_finished_beside(
    trained: dict[str, Run], config: RunConfig, tmp_path: Path
) -> None:
    for run in trained.values():
        (tmp_path / run.name).symlink_to(run.path)
    (tmp_path / "ssd-s9").mkdir()  # begun, not finished
    (tmp_path / "elsewhere-s0").mkdir()
    (tmp_path / "elsewhere-s0/summary.json").touch()
    asked = runs_of(config, ("dense",), (0,), tmp_path)
    others = others_finished(config, tmp_path, asked)
    assert [run.name for run in others] == sorted(f"{name}-s0" for name in METHODS if name != "dense")
    recipe = dataclasses.replace(config, switch=dataclasses.replace(config.switch, sparse_steps=3))
    names = {run.name for run in others_finished(recipe, tmp_path, asked)}
    assert names == {"dense-active-s0", "ssd-paper-s0", "moe-s0"}  # static and the cut inherit the recipe


def test_a_run_that_is_not_there_yet_differs_in_nothing(config: RunConfig, tmp_path: Path) -> None:
    (run,) = runs_of(config, ("dense",), (4,), tmp_path)
    assert differs(run) == []
    assert not run.finished()
