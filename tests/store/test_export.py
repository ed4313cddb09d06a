"""Exports as others see them: dense in plain transformers, sparse in `switchable.load`, nothing pickled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families.models import CASES, inputs, make, output
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from switchable import InputError, SwitchConfig, convert, in_mode, set_mode
from switchable.data.tokenizers import load_tokenizer, save_tokenizer, train_bpe
from switchable.ffn.builders import build_model
from switchable.ffn.convert import layers_of
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.store.load import load
from switchable.store.pretrained import load_pretrained
from switchable.store.probe import save_probe

CONFIG = SwitchConfig(num_experts=8, experts_per_token=3)

PLAIN = """
import json, sys
sys.modules["switchable"] = None  # importing it raises
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
transformers.utils.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    batch = load_file(folder + "-inputs.safetensors")
    with torch.no_grad():
        out = model(**batch, **({"use_cache": False} if "input_ids" in batch else {}))
    y = out.logits if "logits" in out else out.last_hidden_state
    save_file({"y": y.contiguous()}, folder + "-output.safetensors")
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, from elsewhere, without a network."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )


def saved(case: str, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """A converted, regrouped-looking model in a checkpoint's folder, and inputs for it."""
    model = make(case)
    convert(model, CONFIG)
    with torch.no_grad():  # routers that are not what conversion gives them
        for layer in layers_of(model):
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(3))
    save(folder, model)
    return model, inputs(case)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_dense_exports_of_all_families_in_plain_transformers(tmp_path: Path) -> None:
    expected = {}
    for case in CASES:
        model, batch = saved(case, tmp_path / "checkpoint")
        figures = export(tmp_path / "checkpoint", "dense", tmp_path / case, overwrite=True)
        assert figures["parameters"] == sum(
            p.numel() for n, p in model.named_parameters() if ".router." not in n
        )
        with torch.no_grad():
            expected[case] = output(model, batch)
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        save_file(tensors, tmp_path / f"{case}-inputs.safetensors")
        names = {p.name for p in (tmp_path / case).iterdir()}
        assert names <= {"README.md", "config.json", "generation_config.json", "model.safetensors"}, names
        assert "switchable" not in (tmp_path / case / "config.json").read_text()
        assert not any("router" in name for name in load_file(tmp_path / case / "model.safetensors"))
    done = run(PLAIN, *(tmp_path / case for case in CASES))
    assert done.returncode == 0, done.stderr
    for case in CASES:
        assert relative(load_file(tmp_path / f"{case}-output.safetensors")["y"], expected[case]) < 1e-5, case


def test_a_sparse_export_opens_under_any_head(tmp_path: Path) -> None:
    model, batch = saved("opt", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", "sparse", tmp_path / "sparse", experts_per_token=[2, 5])
    (tmp_path / "sparse" / "README.md").write_text("# Mine")  # texts are for everyone to change
    opened, _ = load(tmp_path / "sparse")
    assert {layer.ssd.mode for layer in layers_of(opened)} == {"dense"}
    assert torch.equal(output(opened, batch), output(model, batch))
    with in_mode(model, "sparse", [2, 5]), in_mode(opened, "sparse"):
        assert torch.equal(output(opened, batch), output(model, batch))
    body, _ = load(tmp_path / "sparse", AutoModel)
    headed, _ = load(tmp_path / "sparse", AutoModelForSequenceClassification, num_labels=3)
    assert output(headed, batch).shape == (2, 3)
    for other in (body, headed):
        with in_mode(model, "sparse", [2, 5]), in_mode(other, "sparse"):
            hidden = [m(**batch, output_hidden_states=True).hidden_states[-1] for m in (model, other)]
        assert torch.equal(*hidden)


def test_a_sparse_export_is_the_dense_model_where_we_are_not_installed(tmp_path: Path) -> None:
    """In what reads the files without transformers too: nothing of ours is among the weights.

    `config.json` names a class of ours, which transformers looks at where it is told to.
    """
    model, batch = saved("llama", tmp_path / "checkpoint")
    for to in ("dense", "sparse"):
        export(tmp_path / "checkpoint", to, tmp_path / to)
    weights, configs = (
        [(tmp_path / to / name).read_bytes() for to in ("sparse", "dense")]
        for name in ("model.safetensors", "config.json")
    )
    assert weights[0] == weights[1]
    ours, plain = map(json.loads, configs)
    assert ours.pop("auto_map") == {"AutoModelForCausalLM": "modeling_switchable.LlamaForCausalLM"}
    assert ours == plain
    save_file(batch, tmp_path / "sparse-inputs.safetensors")
    done = run(PLAIN, tmp_path / "sparse")
    assert done.returncode == 0, done.stderr
    assert relative(load_file(tmp_path / "sparse-output.safetensors")["y"], output(model, batch)) < 1e-5


TRUSTED = """
import sys
import lm_eval.models.huggingface
import torch, transformers
from safetensors.torch import load_file, save_file
from switchable.ffn.convert import layers_of
transformers.utils.logging.set_verbosity_error()
folder, batch = sys.argv[1], load_file(sys.argv[1] + "-inputs.safetensors")
plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
assert not layers_of(plain)
told = {"trust_remote_code": True, "device": "cpu"}
models = {
    "auto": transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    "pipeline": transformers.pipeline("text-generation", folder, **told).model,
    "lm_eval": lm_eval.models.huggingface.HFLM(folder, **told).model,
}
assert {type(model) for model in models.values()} == {type(plain)}
with torch.no_grad():
    found = {name: model(**batch).logits for name, model in models.items()}
    found["written"] = models["auto"].generate(batch["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
save_file(found, folder + "-output.safetensors")
half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **{"trust_remote_code": True})
assert half.dtype == torch.bfloat16 and layers_of(half)[0].ssd.mode == "sparse"
half.save_pretrained(folder + "-again")
transformers.AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
"""


def test_transformers_opens_a_sparse_export_in_sparse_mode_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `trust_remote_code`, the word that the folder's README says; in what others make of transformers too."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, batch = make("gpt2"), inputs("gpt2")
    convert(model, CONFIG)
    made = train_bpe(["the cat sat on a mat " * 9], 257)
    model.resize_token_embeddings(len(made))
    save(tmp_path / "own", model, tokenizer=made)
    export(tmp_path / "own", "sparse", tmp_path / "sparse")
    text = (tmp_path / "sparse" / "README.md").read_text()
    for words in (
        "trust_remote_code=True",
        "pretrained=sparse,",
        "`transformers serve` opens the dense model",
    ):
        assert words in text
    save_file(batch, tmp_path / "sparse-inputs.safetensors")
    done = run(TRUSTED, tmp_path / "sparse")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "sparse-output.safetensors")
    set_mode(model.eval(), "sparse")
    for name in ("auto", "pipeline", "lm_eval"):
        assert relative(found[name], output(model, batch)) < 1e-6, name
    written = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found["written"], written)
    export(tmp_path / "sparse", "dense", tmp_path / "dense")
    assert "auto_map" not in (tmp_path / "dense" / "config.json").read_text()


@pytest.mark.parametrize(
    ("family", "activation", "words"),
    [
        ("arcee", "relu2", "llama.cpp computes relu2 in models of type arcee, as this one does."),
        ("gpt2", "relu2", "llama.cpp has gelu_new built into models of type gpt2 and would write other text"),
        ("llama", "relu", "pretrain --family arcee"),
        ("opt", "relu", "nothing is known here"),
    ],
)
def test_an_export_says_whether_llama_cpp_honours_its_activation(
    family: str, activation: str, words: str, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "max_positions": 8}
    model = build_model(family, sizes, activation, 50, {"eos_token_id": 0})
    convert(model, CONFIG)
    save(tmp_path / "own", model)
    for to in ("dense", "sparse"):
        assert words in export(tmp_path / "own", to, tmp_path / to)["engines"]
        assert words in (tmp_path / to / "README.md").read_text()


@pytest.mark.parametrize("case", ["gpt2", "bert-classifier", "t5", "bart", "vit"])
def test_checkpoints_and_sparse_exports_come_back_bit_by_bit(tmp_path: Path, case: str) -> None:
    model, batch = saved(case, tmp_path / "checkpoint")
    set_mode(model, "sparse")
    expected = output(model, batch)
    export(tmp_path / "checkpoint", "sparse", tmp_path / "sparse")
    for folder in ("checkpoint", "sparse"):
        again, tokenizer = load(tmp_path / folder)
        assert tokenizer is None
        set_mode(again, "sparse")
        assert torch.equal(output(again, batch), expected)
    export(tmp_path / "sparse", "dense", tmp_path / "dense")
    set_mode(model, "dense")
    assert torch.equal(output(load_pretrained(tmp_path / "dense"), batch), output(model, batch))


def test_shards(tmp_path: Path) -> None:
    model, batch = saved("bert", tmp_path / "checkpoint")
    for to in ("dense", "sparse"):
        figures = export(tmp_path / "checkpoint", to, tmp_path / to, max_shard_size="10KB")
        assert figures["weight_files"] > 2
        assert (tmp_path / to / "model.safetensors.index.json").is_file()
    assert torch.equal(output(load_pretrained(tmp_path / "dense"), batch), output(model, batch))
    again, _ = load(tmp_path / "sparse")
    set_mode(again, "sparse")
    set_mode(model, "sparse")
    assert torch.equal(output(again, batch), output(model, batch))


def test_a_family_of_the_users_own_is_remembered(tmp_path: Path) -> None:
    from switchable.ffn.families import Family
    from switchable.ffn.table import FAMILIES

    model = make("gpt2")
    row = FAMILIES["gpt2"]
    assert isinstance(row, Family)
    convert(model, CONFIG, Family(**{**row.__dict__, "in_layer": False, "layers": "n_layer"}))
    save(tmp_path / "checkpoint", model)
    again, _ = load(tmp_path / "checkpoint")
    assert layers_of(again)[0].ssd.settings.family.layers == "n_layer"


def test_bad_input_is_told_and_damages_nothing(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "checkpoint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    with pytest.raises(InputError, match="does not hold a model; choose another folder"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all my work"
    export(tmp_path / "checkpoint", "dense", tmp_path / "dense")
    with pytest.raises(InputError, match="replace it with --overwrite"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "dense")
    with pytest.raises(InputError, match=r"is .*checkpoint, which is read"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "checkpoint", overwrite=True)
    with pytest.raises(InputError, match="max_shard_size='big' is not a size"):
        export(tmp_path / "checkpoint", "dense", tmp_path / "x", max_shard_size="big")
    with pytest.raises(InputError, match="experts_per_token=9 is not possible"):
        export(tmp_path / "checkpoint", "sparse", tmp_path / "x", experts_per_token=9)
    with pytest.raises(InputError, match="has 3 values for 2 FFNs"):
        export(tmp_path / "checkpoint", "sparse", tmp_path / "x", experts_per_token=[1, 2, 3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "dense", "mine"]


def test_weights_that_are_missing_pickled_or_of_another_model(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "plain")
    weights, config = tmp_path / "plain" / "model.safetensors", tmp_path / "plain" / "config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"n_layer": 3}, r"12 missing, e\.g\. transformer\.h\.2"),
        ({"n_layer": 1}, r"11 of layers that the config does not have, e\.g\. transformer\.h\.1"),
        ({"n_inner": 32}, r"of another shape, e\.g\. transformer\.h\.0\.mlp\.c_fc"),
        ({"architectures": ["GPT9"]}, "names the model class 'GPT9'"),
        ({"model_type": "gpt9"}, "cannot be used"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            load_pretrained(tmp_path / "plain")
    config.write_text(json.dumps(settings))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pretrained(tmp_path / "plain")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match=r"are pickled \(pytorch_model\.bin\), which we never open"):
        load_pretrained(tmp_path / "plain")
    weights.with_name("pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds no weights \(\*\.safetensors\)"):
        load_pretrained(tmp_path / "plain")
    config.unlink()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_pretrained(tmp_path / "plain")


def test_the_lines_of_the_readme_open_each_folder(tmp_path: Path) -> None:
    """As they stand, each from the folder that the exported one lies in."""
    model = make("gpt2")
    model.resize_token_embeddings(257)
    convert(model, CONFIG)
    save(tmp_path / "own", model, tokenizer=train_bpe(["the cat sat on a mat " * 9], 257))
    for to in ("dense", "sparse"):
        export(tmp_path / "own", to, tmp_path / to)
    for layer in layers_of(model):
        layer.ssd.takes_part = False
    save(tmp_path / "never", model, tokenizer=load_tokenizer(tmp_path / "own"))
    del model
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for folder, mode in (("dense", None), ("sparse", "sparse"), ("own", "sparse"), ("never", "dense")):
            text = (tmp_path / folder / "README.md").read_text()
            lines = text.partition("```python\n")[2].partition("```")[0]
            assert len(lines.splitlines()) == 3
            assert str(tmp_path) not in text
            assert "Its FFNs compute relu, as config.json says." in text
            found: dict[str, Any] = {}
            exec(lines, found)
            assert [layer.ssd.mode for layer in layers_of(found["model"])] == [mode] * 2 * (mode is not None)
            assert len(found["tokenizer"]) == 257
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_may_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        saved("gpt2", tmp_path / "own")
        export(tmp_path / "own", "dense", tmp_path / "dense", max_shard_size="10KB")
        save_probe(tmp_path / "probe", [inputs("gpt2")])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        (path.name for path in files), mode
    )


@pytest.mark.parametrize("objective", ["causal", "masked", "span"])
def test_a_tokenizer_is_saved_under_names_that_transformers_4_knows(tmp_path: Path, objective: str) -> None:
    tokenizer = train_bpe(["the cat sat on a mat " * 9], 400, objective)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config  # a list there ends transformers 4 with an AttributeError
    again = load_tokenizer(tmp_path)
    text = "a cat <mask> sat <extra_id_3></s>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_configs_and_weights_have_the_names_that_transformers_4_knows(tmp_path: Path) -> None:
    theta = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        hidden_act="relu", rope_parameters=theta,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    convert(model, CONFIG)
    save(tmp_path / "own", model)
    export(tmp_path / "own", "dense", tmp_path / "dense")
    for folder in ("own", "dense"):
        found = json.loads((tmp_path / folder / "config.json").read_text())
        assert found["rope_theta"] == 50.0
        assert found["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
        assert found["torch_dtype"] == "bfloat16"
        assert load_pretrained(tmp_path / folder).config.rope_parameters == theta
    saved("gpt_neox", tmp_path / "neox")  # transformers 5 calls its head lm_head, the hub embed_out
    export(tmp_path / "neox", "dense", tmp_path / "neox-dense")
    assert "embed_out.weight" in load_file(tmp_path / "neox-dense" / "model.safetensors")


def test_no_tensors_of_ours_lie_where_tools_look_for_weights(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "checkpoint")
    names = {name for path in (tmp_path / "checkpoint").glob("*.safetensors") for name in load_file(path)}
    assert names == set(make("gpt2").state_dict()) - {"lm_head.weight"}  # tied
