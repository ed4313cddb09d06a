"""`save_pretrained` and transformers' Trainer keep all that opens the model switchable again; older folders open."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import inputs, make, output
from safetensors.torch import load_file, save_file
from support import tiny_gpt2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from switchable import InputError, SwitchConfig, convert, in_mode, load, set_mode
from switchable.data.tokenizers import train_bpe
from switchable.ffn.convert import layers_of
from switchable.ffn.description import decoded, encoded
from switchable.store import folders
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.switching.switch import regroup

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)
OLDER = Path(__file__).parent / "older"
KEPT = ("num_experts", "experts_per_token", "takes_part", "why_dense")


def trained(case: str) -> Any:
    """A converted model with routers, K and neuron order of its own, whose first FFN stays dense."""
    model = make(case)
    convert(model, CONFIG)
    layers = layers_of(model)
    regroup(layers, [(torch.arange(64) * (3 + 2 * i)) % 8 for i in range(len(layers))])
    for i, layer in enumerate(layers):
        with torch.no_grad():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(i))
        layer.ssd.experts_per_token = 2 + i
    layers[0].ssd.takes_part, layers[0].ssd.why_dense = False, "it is never „sparse“"
    return model


def assert_same(opened: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Both are the same switchable model."""
    for ours, theirs in zip(layers_of(opened), layers_of(model), strict=True):
        for name in KEPT:
            assert getattr(ours.ssd, name) == getattr(theirs.ssd, name), name
        assert torch.equal(ours.ssd.neuron_ids_F, theirs.ssd.neuron_ids_F)
        assert ours.ssd.settings.family == theirs.ssd.settings.family
    found = []
    for each in (opened, model):
        for mode in ("dense", "sparse"):
            with in_mode(each, mode), torch.no_grad():
                found.append(output(each.eval(), batch))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


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


PLAIN = """
import json, sys
sys.modules["switchable"] = None  # importing it raises
import torch, transformers
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(names for what, names in found.items() if what != "unexpected_keys"), found
    assert found["unexpected_keys"] and all(".router." in name for name in found["unexpected_keys"]), found
    with torch.no_grad():
        save_file({"y": model(**load_file(folder + ".inputs")).logits.contiguous()}, folder + ".output")
"""


def offline(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, without a network."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )


def test_transformers_alone_opens_the_dense_model(tmp_path: Path) -> None:
    cases = ("gpt2", "opt", "t5-gated")
    for case in cases:
        trained(case).save_pretrained(tmp_path / case)
        save_file(inputs(case), tmp_path / f"{case}.inputs")
    done = offline("-c", PLAIN, *(tmp_path / case for case in cases))
    assert done.returncode == 0, done.stderr
    for case in cases:
        found, expected = load_file(tmp_path / f"{case}.output")["y"], output(trained(case), inputs(case))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


@pytest.mark.parametrize("to", ["sparse export", "save_pretrained"])
def test_the_command_of_lm_eval_opens_the_dense_model(tmp_path: Path, to: str) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval: pip install 'switchable[eval]'")
    model, tokenizer = trained("gpt2"), train_bpe(["the cat sat on a mat " * 9], 257)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(tmp_path / "own", model, tokenizer=tokenizer)
    if to == "sparse export":
        export(tmp_path / "own", "sparse", tmp_path / "folder")
    else:
        model.save_pretrained(tmp_path / "folder")
        tokenizer.save_pretrained(str(tmp_path / "folder"))
    (tmp_path / "data.jsonl").write_text('{"context": "the cat sat on", "word": "a"}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    done = offline(
        "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'folder'},max_length=32",
        "--tasks", "tiny", "--include_path", tmp_path / "tasks", "--device", "cpu", "--batch_size", "1",
        "--output_path", tmp_path / "scores", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (scores,) = (tmp_path / "scores").rglob("*.json")
    found = json.loads(scores.read_text())["results"]["tiny"]["perplexity,none"]
    before, after = (tokenizer(text)["input_ids"] for text in ("the cat sat on", " a"))
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = log_p[len(before) - 1 : -1]
    loss = -sum(float(row[token]) for row, token in zip(rows, after, strict=True))
    assert found == pytest.approx(math.exp(loss), rel=1e-3)
    assert ("UNEXPECTED" in done.stderr + done.stdout) == (to == "save_pretrained")


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
    measured = [
        [x for x in t.state.log_history if "switchable_pattern_similarity" in x] for t in (whole, resumed)
    ]
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


def reseal(folder: Path) -> None:
    """Give a folder a manifest of its tensors as they are now."""
    folders.seal(folder, {path.name: folders.entry(path) for path in folder.glob("*tensors")})


def alter(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the descriptions in a sparse export."""
    tensors = load_file(folder / "switchable.tensors")
    for name in [name for name in tensors if name.endswith("_extra_state")]:
        described = decoded(tensors[name])
        change(described)
        tensors[name] = encoded(described)
    save_file(tensors, folder / "switchable.tensors")
    reseal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"h\.\d\.mlp is described in format 2, of a later version; update switchable"),
        ({"num_experts": 4}, r"router\.weight has shape \(8, 16\), not \(4, 16\)"),
        ({"num_experts": 5}, r"num_experts=5 does not divide d_ff=64"),
        ({"experts_per_token": 9}, r"experts_per_token=9 is not possible"),
        ({"takes_part": "yes"}, r"is that of another FFN, or damaged"),
        ({"neuron_ids": [0] * 64}, r"is that of another FFN, or damaged"),
        ({"neuron_ids": "0"}, r"the description of transformer\.h\.0\.mlp is damaged"),
        ({"family": {"ffn": "GPT2MLP", "novel": 1}}, r"unexpected keyword argument 'novel'"),
        ({"family": "gpt2"}, r"do not fit its model"),
        ({"family": {"ffn": "GPT9MLP", "up": "a", "down": "b"}}, r"found 0 of 2 FFNs of class 'GPT9MLP'"),
        ({"gate": "softmax"}, r"its experts' outputs are scaled"),
    ],
)
def test_experts_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(tmp_path / "own", trained("gpt2"))
    export(tmp_path / "own", "sparse", tmp_path / "sparse")
    alter(tmp_path / "sparse", lambda described: described.update(change))
    with pytest.raises(InputError, match=rf"experts of .*sparse .*{message}"):
        load(tmp_path / "sparse")


def test_damaged_experts_are_refused(tmp_path: Path) -> None:
    for case in ("gpt2", "t5", "vit"):
        save(tmp_path / case, trained(case))
    export(tmp_path / "gpt2", "sparse", tmp_path / "sparse")
    own = tmp_path / "sparse" / "switchable.tensors"

    def refused(message: str, folder: Path = own.parent) -> None:
        with pytest.raises(InputError, match=message) as told:
            load(folder)
        assert "\n" not in str(told.value)

    for other, message in (("t5", "found 0 of"), ("vit", "found 0 of 2")):
        shutil.copy(tmp_path / other / "switchable.tensors", own)
        refused(r"switchable\.tensors has \d+ bytes instead of \d+")
        reseal(own.parent)
        refused(f"experts of .* do not fit its model: .*({message})")
    own.write_bytes((tmp_path / "gpt2" / "switchable.tensors").read_bytes()[:700])
    reseal(own.parent)
    refused(r"switchable\.tensors is missing or damaged")
    own.unlink()
    refused(r"is damaged \(switchable\.tensors is missing\)")
    shutil.copytree(OLDER / "checkpoint", tmp_path / "older")
    for text in ('{"layers": 3}', '{"num_experts": 4, "layers": {}}', "[]", "{"):
        (tmp_path / "older" / "switchable.json").write_text(text)
        folders.seal(
            tmp_path / "older",
            {p.name: folders.entry(p) for p in (tmp_path / "older").iterdir() if p.name != "manifest.json"},
        )
        refused(r"the experts of .*older (cannot be read|do not fit)", tmp_path / "older")
    trained("gpt2").save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(weights)
    tensors["transformer.h.0.mlp.router._extra_state"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(r"experts of .*saved cannot be read: their description is damaged", tmp_path / "saved")
    del tensors["transformer.h.0.mlp.router._extra_state"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(r"experts of .*saved do not fit its model: there are 1 of them for 2 FFNs", tmp_path / "saved")
    weights.write_bytes(weights.read_bytes()[:9000])
    refused(r"saved cannot be loaded", tmp_path / "saved")
