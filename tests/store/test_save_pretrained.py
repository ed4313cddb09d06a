"""`save_pretrained` and transformers' Trainer keep all that opens the model switchable again; older folders open."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from families.models import inputs, make, output
from store.models import CONFIG, OLDER, assert_same, trained
from support import tiny_gpt2
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from switchable import SwitchConfig, convert, in_mode, load, set_mode
from switchable.ffn.convert import layers_of
from switchable.store.checkpoint import save
from switchable.store.export import export


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "opt", "bert", "t5-gated", "bart", "vit"])
def test_what_save_pretrained_wrote_opens_switchable(tmp_path: Path, case: str) -> None:
    model = trained(case)
    make(case).save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "a" / "b")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB", state_dict=model.state_dict())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "a" / "b", tmp_path / "shards"):
        opened, _ = load(folder)
        assert type(opened) is type(model)
        assert_same(opened, model, inputs(case))
        opened.save_pretrained(tmp_path / "again")
        assert_same(load(tmp_path / "again")[0], model, inputs(case))
        assert (folder / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()


def test_a_part_of_a_model_that_is_saved_opens(tmp_path: Path) -> None:
    model = trained("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert_same(load(tmp_path)[0], model.transformer, inputs("gpt2"))
    whole, _ = load(tmp_path, AutoModelForCausalLM)  # its head is tied
    assert_same(whole, model, inputs("gpt2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_opens_in_it(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained("llama").to(dtype)
    model.save_pretrained(tmp_path)
    opened, _ = load(tmp_path)
    assert next(opened.parameters()).dtype == dtype
    with in_mode(model, "sparse"), in_mode(opened, "sparse"), torch.no_grad():
        assert torch.equal(output(opened, inputs("llama")), output(model, inputs("llama")))


def test_the_k_that_was_set_is_saved(tmp_path: Path) -> None:
    model = trained("opt")
    set_mode(model, "sparse", [5, 2])
    save(tmp_path / "own", model)
    export(tmp_path / "own", "sparse", tmp_path / "sparse")
    opened, _ = load(tmp_path / "sparse")
    copied = copy.deepcopy(opened)
    twin = type(model)(model.config)  # shares its config, is not converted
    set_mode(opened, "sparse", [7, 6])
    opened.save_pretrained(tmp_path / "opened")
    set_mode(copied, "sparse", 1)
    copied.save_pretrained(tmp_path / "copied")
    twin.save_pretrained(tmp_path / "twin")
    for folder, k in (
        ("own", [5, 2]),
        ("sparse", [5, 2]),
        ("opened", [7, 6]),
        ("copied", [1, 1]),
        ("twin", []),
    ):
        again, _ = load(tmp_path / folder)
        assert [layer.ssd.experts_per_token for layer in layers_of(again)] == k, folder


def test_a_state_dict_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other, third = trained("bert"), make("bert"), make("bert")
    for each in (other, third):
        convert(each, CONFIG)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(other, model, inputs("bert"))
    # All descriptions of a layer are of one size, and the average of different ones is told and not taken.
    averaged = {n: (t + third.state_dict()[n]) / 2 for n, t in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        third.load_state_dict(averaged)
    assert caplog.text.count("keeps its own K and part in sparse mode") == 2
    assert [layer.ssd.experts_per_token for layer in layers_of(third)] == [3, 3]


SWITCHING = SwitchConfig(
    num_experts=8, experts_per_token=3, monitor_every=3, min_dense_fraction=0.2, stability_threshold=0.0,
    max_activation_ratio=1.0, min_mass_caught=0.0, sparse_steps=2, final_dense_fraction=0.0,
)  # fmt: skip


def test_checkpoints_of_the_trainer_open_and_resume_with_every_neuron_known(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer

    from switchable.integrations.hf_trainer import SwitchableCallback

    ids = torch.randint(0, 61, (48, 24), generator=torch.Generator().manual_seed(5))

    def train(out: Path, resume: Path | None = None) -> Trainer:
        model = tiny_gpt2()
        convert(model, SWITCHING)
        arguments = TrainingArguments(
            output_dir=str(out), max_steps=12, save_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(
            model, arguments, train_dataset=rows, callbacks=[SwitchableCallback(ids[:8], SWITCHING)]
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    whole = train(tmp_path / "whole")
    model: PreTrainedModel = whole.model  # type: ignore[assignment]
    assert any(not torch.equal(layer.ssd.neuron_ids_F, torch.arange(64)) for layer in layers_of(model))
    set_mode(model, "dense", [5, 1])
    whole.save_model(str(tmp_path / "saved"))
    batch = {"input_ids": ids[:2]}
    assert_same(load(tmp_path / "saved")[0], model, batch)
    early, _ = load(tmp_path / "whole" / "checkpoint-6")
    assert any(not torch.equal(layer.ssd.neuron_ids_F, torch.arange(64)) for layer in layers_of(early))
    set_mode(model, "dense", 3)
    assert_same(load(tmp_path / "whole" / "checkpoint-12")[0], model, batch)
    resumed = train(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-6")
    assert_same(resumed.model, model, batch)  # type: ignore[arg-type]
    measured = [[x for x in t.state.log_history if "switchable_similarity" in x] for t in (whole, resumed)]
    assert len(measured[0]) > 3
    assert json.dumps(measured[0], sort_keys=True) == json.dumps(measured[1], sort_keys=True)


@pytest.mark.parametrize("kind", ["checkpoint", "sparse-export"])
def test_folders_of_an_older_form_open(kind: str) -> None:
    """Written before descriptions lay with the routers; the figures are what was computed then."""
    model, _ = load(OLDER / kind)
    ssds = [layer.ssd for layer in layers_of(model)]
    assert [ssd.experts_per_token for ssd in ssds] == [3, 1]
    assert [ssd.why_dense for ssd in ssds] == ["too many of its neurons are active", ""]
    order = (
        [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15] if kind == "checkpoint" else list(range(16))
    )
    assert ssds[0].neuron_ids_F.tolist() == order
    assert not hasattr(model.config, "quantization_config")
    for mode, expected in (
        ("dense", [-0.051186, -0.38201, 0.58632, 0.933546]),
        ("sparse", [-0.053737, -0.392513, 0.573793, 0.950411]),
    ):
        with in_mode(model, mode), torch.no_grad():
            logits = model(input_ids=torch.arange(8)[None]).logits[0, -1, :4]
        torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-5)
