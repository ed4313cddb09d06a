"""The study of a run: finished, still being written, damaged, of an older version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from study.runs import SMALL, names

from switchable import InputError
from switchable.config import from_dict
from switchable.ffn.convert import layers_of
from switchable.ffn.description import decoded, encoded
from switchable.store import folders
from switchable.store.load import load
from switchable.store.probe import load_probe
from switchable.study.config import StudyConfig
from switchable.study.findings import findings, spread
from switchable.study.measures import measure_model
from switchable.study.report import write_report
from switchable.study.study import records_of_run, study_run
from switchable.train.loop import snapshot_steps
from switchable.train.pretrain import pretrain


def test_snapshots_stand_close_together_early_on() -> None:
    assert sorted(snapshot_steps(600, 5)) == [6, 19, 60, 190, 600]
    assert sorted(snapshot_steps(20, 3)) == [1, 4, 20]
    assert snapshot_steps(600, 1) == {600}
    assert snapshot_steps(600, 0) == set()


def test_a_run_is_studied(trained: Path, study_of: Any, tmp_path: Path) -> None:
    code, printed, err = study_of(trained)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "out/study.json").read_text())
    assert found["steps"] == [1, 4, 10, 20]  # three snapshots, and the checkpoint of step 10
    assert len(printed["findings"]) == 3
    for name in printed["pictures"]:
        assert (tmp_path / f"out/pictures/{name}.png").stat().st_size > 5000
    needed = {"loss", "activation_ratio", "similarity_pattern", "mass", "load"}
    assert needed <= set(printed["pictures"])
    # The figures of the last checkpoint are those of the finished model, and the monitor's at that step or near it.
    model, _ = load(trained / "final")
    direct = measure_model(model, load_probe(trained / "probe.safetensors"))
    for layer, (expected, _) in zip(found["results"][-1], direct, strict=True):
        assert layer["activation_ratio"] == pytest.approx(expected.activation_ratio)
        assert layer["mass_router"] == pytest.approx(expected.mass_router)
    assert any(not torch.equal(layer.ssd.neuron_ids_F, torch.arange(64)) for layer in layers_of(model))
    page = (tmp_path / "out/report.html").read_text()
    assert all(sentence.replace("'", "&#39;") in page for sentence in printed["findings"])


def test_k_is_that_of_the_checkpoint_and_the_layer(corpus: Path, tmp_path: Path) -> None:
    switch = SMALL["switch"] | {"mass_target": 0.6}
    config = from_dict(SMALL | {"data": {"vocab_size": 300, "data": [str(corpus)]}, "switch": switch})
    summary = pretrain(config, tmp_path / "run", tmp_path / "cache", quiet=True)
    study = study_run(tmp_path / "run", StudyConfig())
    ks = [[layer.experts_per_token for layer in layers] for layers in study.results]
    assert ks[0] == [3, 3]  # the settings', before anything was measured
    assert ks[-1] == list(summary["experts_per_token"]) != ks[0]
    own = load(tmp_path / "run/final")[0]
    assert ks[-1] == [layer.ssd.experts_per_token for layer in layers_of(own)]
    last = study.results[-1]
    assert [layer.mass_caught for layer in last] == [
        r.mass_router[k - 1] for r, k in zip(last, ks[-1], strict=True)
    ]
    assert f"router's {spread(ks[-1])} of 8 experts" in findings(study)[-1]
    assert f"router's {spread(ks[-1])} of 8 experts" in findings(records_of_run(tmp_path / "run"))[-1]
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for layer, k in zip(last, ks[-1], strict=True):
        assert f"<td>{k} of 8<td>{100 * layer.mass_caught:.1f} %" in page


def test_an_older_study_is_replaced_only_when_told(trained: Path, tmp_path: Path, study_of: Any) -> None:
    assert study_of(trained)[0] == 0
    (tmp_path / "out/pictures/of-older-version.svg").write_text("<svg>")
    before = (tmp_path / "out/report.html").read_bytes()
    code, printed, err = study_of(trained)
    assert (code, printed) == (2, {})
    assert "holds a study already; replace it with --overwrite, or choose another folder with --out" in err
    assert (tmp_path / "out/report.html").read_bytes() == before
    assert study_of(trained, "--overwrite")[0] == 0
    assert not (tmp_path / "out/pictures/of-older-version.svg").exists()
    for name in ("report.html", "study.json"):
        (tmp_path / "out" / name).unlink()
    code, printed, err = study_of(trained, "--overwrite")
    assert (code, printed) == (2, {})
    assert "exists and does not hold a study" in err
    assert (tmp_path / "out/pictures").is_dir()


def test_a_run_still_being_written_shows_what_there_is(trained: Path, study_of: Any, tmp_path: Path) -> None:
    going_on = tmp_path / "going-on"
    shutil.copytree(trained, going_on, ignore=shutil.ignore_patterns("summary.json", "final", "report.html"))
    shutil.rmtree(going_on / "snapshots/step-000020")
    shutil.rmtree(going_on / "checkpoints")
    code, printed, err = study_of(going_on)
    assert code == 2
    assert printed["checkpoints"] == 2
    assert "is not finished" in err
    assert "is not finished" in (tmp_path / "out/report.html").read_text()
    shutil.rmtree(going_on / "snapshots")
    study = study_run(going_on, StudyConfig())
    assert "has no checkpoints" in study.problems[1]
    assert {"loss", "activation_ratio"} <= names(study)
    (going_on / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="neither checkpoints nor figures yet"):
        study_run(going_on, StudyConfig())


def test_a_truncated_checkpoint_is_left_out(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(trained, run)
    weights = run / "snapshots/step-000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    study = study_run(run, StudyConfig())
    assert study.steps == [1, 10, 20]
    assert "step-000004 is damaged (model.safetensors has 1000 bytes instead of" in study.problems[0]


def test_an_empty_folder_and_other_wrong_input_are_refused(
    trained: Path, study_of: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "is not the folder of a run"),
        ([tmp_path / "nowhere"], "is not the folder of a run"),
        ([trained, "--probe-tokens", "16"], "too small for the measures"),
        ([trained, "--checkpoints", tmp_path], "give either"),
        ([], "give either"),
        (["--checkpoints", tmp_path / "no*"], "no such folder"),
        (["--checkpoints", tmp_path / "empty"], "is a folder with a model"),
        ([trained, "--probe-tokens", "0"], "probe_tokens=0 is out of range"),
    ):
        code, printed, err = study_of(*arguments)
        assert (code, printed) == (2, {}), arguments
        assert message in err
        assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_tell_their_neurons_order_are_not_compared(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "old"
    shutil.copytree(trained, run)
    folder = run / "snapshots/step-000004"
    state = load_file(folder / "switchable.tensors")
    for name in [name for name in state if name.endswith("_extra_state")]:
        described = decoded(state[name])
        del described["neuron_ids"]
        state[name] = encoded(described)
    save_file(state, folder / "switchable.tensors")
    (folder / folders.MANIFEST).unlink()
    folders.seal(folder, {path.name: folders.entry(path) for path in folder.iterdir()})
    study = study_run(run, StudyConfig())
    assert "step-000004 does not tell which neuron is which" in study.problems[0]
    assert "similarity_pattern" not in names(study)
    assert "mass" in names(study)


def test_neuron_order_goes_with_the_checkpoint(trained: Path) -> None:
    early, _ = load(trained / "snapshots/step-000001")
    for layer in layers_of(early):
        assert torch.equal(layer.ssd.neuron_ids_F, torch.arange(64))
    late, _ = load(trained / "final")
    for layer in layers_of(late):
        assert torch.equal(layer.ssd.neuron_ids_F.sort().values, torch.arange(64))
