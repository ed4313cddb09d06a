"""The study as a whole: runs, series of other checkpoints, single models, and all that can be wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_gpt2
from torch import nn

from switchable import InputError
from switchable.cli import main
from switchable.config import from_dict
from switchable.data.tokenizers import train_bpe
from switchable.ffn.builders import build_model
from switchable.ffn.convert import layers_of
from switchable.ffn.description import decoded, encoded
from switchable.store import folders
from switchable.store.load import load
from switchable.store.probe import load_probe
from switchable.study.config import StudyConfig
from switchable.study.findings import findings, spread
from switchable.study.measures import measure_model
from switchable.study.pictures import pictures_of
from switchable.study.report import write_report, write_run_report
from switchable.study.result import Study
from switchable.study.study import records_of_run, study_checkpoints, study_run
from switchable.train.loop import snapshot_steps
from switchable.train.pretrain import pretrain

SMALL: dict[str, Any] = {
    "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
    "data": {"vocab_size": 300},
    "train": {
        "steps": 20, "batch_size": 4, "sequence_length": 16, "log_every": 4, "eval_every": 10, "checkpoint_every": 10,
        "eval_tokens": 512, "threads": 1, "snapshots": 3, "probe_tokens": 256,
    },
    "switch": {
        "recipe": "early", "num_experts": 8, "experts_per_token": 3, "monitor_every": 3,
        "stability_threshold": 0.0, "max_activation_ratio": 1.0, "min_mass_caught": 0.0, "sparse_steps": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("study")
    config = from_dict(SMALL | {"data": {"vocab_size": 300, "data": [str(corpus)]}})
    pretrain(config, base / "run", base / "cache", quiet=True)
    write_run_report(base / "run")
    return base / "run"


@pytest.fixture
def study_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the verb; returns exit code, the JSON line (empty if none) and what is on stderr."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        code = main(["study", *map(str, arguments), "--out", str(tmp_path / "out"), "--quiet"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return run


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


def test_the_monitor_measures_patterns_and_routes_live(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "measure"]
    assert measured[0]["layers"][0]["pattern_similarity"] is None
    for line in measured[1:]:
        for layer in line["layers"]:
            assert 0.0 < layer["pattern_similarity"] <= 1.0
            assert 0.0 <= layer["routing_changed"] <= 1.0
            assert layer["dead"] + layer["always_on"] <= 1.0


def test_pretrain_writes_a_report_of_its_own(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert "Activation" in page
    assert "data:image/svg+xml;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")


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


def names(study: Study) -> set[str]:
    return {picture.name for picture in pictures_of(study)}


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


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Three plain checkpoints as transformers saves them, with a tokenizer, and one of another shape."""
    base = tmp_path_factory.mktemp("series")
    tokenizer = train_bpe([p.read_text() for p in sorted(corpus.iterdir())[:3]], 260)
    for step in (100, 20, 3):
        model = resized(tiny_gpt2())
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_fc.weight.add_(0.003 * step * torch.randn(block.mlp.c_fc.weight.shape))
        model.save_pretrained(base / f"step{step}")
    resized(tiny_gpt2(layers=3)).save_pretrained(base / "other7")
    tokenizer.save_pretrained(base)
    return base


def resized(model: nn.Module) -> Any:
    any_model: Any = model
    any_model.resize_token_embeddings(300)
    return any_model


def settings(text: Path, **changes: Any) -> StudyConfig:
    return StudyConfig(text=(str(text),), **changes)


def test_plain_checkpoints_are_studied_and_stay_as_they_are(series: Path, corpus: Path) -> None:
    before = {p: p.read_bytes() for p in series.rglob("*") if p.is_file()}
    study = study_checkpoints([f"{series}/step*"], settings(corpus, probe_tokens=256, num_experts=16))
    assert (study.problems, study.steps) == ([], [3, 20, 100])
    assert (study.layers[0].num_experts, study.results[0][0].experts_per_token) == (16, 3)
    assert study.probe["tokens"] == 256
    pattern = study.pairs["pattern"][0]
    assert pattern[0][1] > pattern[0][2]  # further apart, less alike: neurons are compared with themselves
    assert {p: p.read_bytes() for p in series.rglob("*") if p.is_file()} == before
    assert "similarity_pattern" in names(study)
    assert "loss" not in names(study)


def test_checkpoints_of_another_shape_and_broken_ones_are_left_out(
    series: Path, corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "step500"
    shutil.copytree(series / "step20", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    given = [str(f) for f in (series / "step3", series / "other7", series / "step20", broken)]
    study = study_checkpoints(given, settings(corpus, tokenizer=str(series)))
    assert study.steps == [3, 20]
    assert "other7 has 3 FFNs, the first checkpoint 2" in study.problems[0]
    assert "step500/model.safetensors is missing or damaged" in study.problems[1]
    with pytest.raises(
        InputError, match=r"none of 1 checkpoints can be studied; .*step500/model\.safetensors is"
    ):
        study_checkpoints([str(broken)], settings(corpus, tokenizer=str(series)))


def test_one_model_of_another_activation_is_studied(
    series: Path, corpus: Path, study_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resized(tiny_gpt2("gelu_new")).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    code, printed, err = study_of(
        tmp_path / "model", "--text", corpus, "--tokenizer", series, "--sequence-length", 16
    )
    assert (code, err) == (0, "")
    assert len(printed["findings"]) == 3
    assert not {"similarity_pattern", "activation_ratio"} & set(printed["pictures"])
    assert "gelu_new is never exactly zero" in (tmp_path / "out/report.html").read_text()


def test_too_little_text_is_refused(series: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match="measuring needs at least 64 tokens"):
        study_checkpoints([f"{series}/step*"], settings(tmp_path / "short.txt"))


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


def test_everything_shown_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&"
    study = Study(title=evil, config={evil: evil}, notes=[evil], problems=[evil], versions={evil: evil})
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;") == 8


def test_neuron_order_goes_with_the_checkpoint(trained: Path) -> None:
    early, _ = load(trained / "snapshots/step-000001")
    for layer in layers_of(early):
        assert torch.equal(layer.ssd.neuron_ids_F, torch.arange(64))
    late, _ = load(trained / "final")
    for layer in layers_of(late):
        assert torch.equal(layer.ssd.neuron_ids_F.sort().values, torch.arange(64))


@pytest.mark.parametrize(("family", "ffns"), [("bert", 2), ("t5", 4), ("llama", 2), ("opt", 2)])
def test_models_of_other_families_are_studied(
    family: str, ffns: int, series: Path, corpus: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "max_positions": 32}
    build_model(family, sizes, "relu", 300, {"eos_token_id": 0, "pad_token_id": 1}).save_pretrained(
        tmp_path / "model"
    )  # type: ignore[operator]
    study = study_checkpoints(
        [str(tmp_path / "model")],
        settings(corpus, tokenizer=str(series), sequence_length=32, probe_tokens=256),
    )
    assert study.problems == []
    assert [(shape.d_ff, shape.num_experts) for shape in study.layers] == [(48, 24)] * ffns
    for layer in study.results[0]:
        assert layer.experts_per_token == 4
        assert 0.2 < layer.activation_ratio < 0.8  # random weights: about half the neurons, gated or not
        assert layer.mass_router[-1] == pytest.approx(1.0)
