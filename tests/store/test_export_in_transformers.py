"""Exports as transformers sees them, with `trust_remote_code` and without, and under the names of version 4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families.models import CASES, inputs, make, output
from safetensors.torch import load_file, save_file
from store.models import CONFIG, saved
from support import offline, relative_error
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from switchable import convert, set_mode
from switchable.data.tokenizers import load_tokenizer, save_tokenizer, train_bpe
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.store.pretrained import load_pretrained

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


def test_exports_of_all_families_and_a_sparse_one_are_the_dense_model_in_plain_transformers(
    tmp_path: Path,
) -> None:
    """In one process for all of them, where we are not installed."""
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
    _, batch = saved("llama", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", "sparse", tmp_path / "sparse")
    expected["sparse"] = expected["llama"]
    save_file(batch, tmp_path / "sparse-inputs.safetensors")
    done = offline("-c", PLAIN, *(tmp_path / name for name in expected))
    assert done.returncode == 0, done.stderr
    for name, wanted in expected.items():
        found = load_file(tmp_path / f"{name}-output.safetensors")["y"]
        assert relative_error(found, wanted) < 1e-5, name


def test_a_sparse_export_is_the_dense_model_for_what_reads_the_files_without_transformers(
    tmp_path: Path,
) -> None:
    """Nothing of ours is among the weights.

    `config.json` names a class of ours, which transformers looks at where it is told to.
    """
    saved("llama", tmp_path / "checkpoint")
    for to in ("dense", "sparse"):
        export(tmp_path / "checkpoint", to, tmp_path / to)
    weights, configs = (
        [(tmp_path / to / name).read_bytes() for to in ("sparse", "dense")]
        for name in ("model.safetensors", "config.json")
    )
    assert weights[0] == weights[1]
    ours, plain = map(json.loads, configs)
    opened = ("AutoModelForCausalLM", "AutoModelForDecision")
    assert ours.pop("auto_map") == dict.fromkeys(opened, "modeling_switchable.LlamaForCausalLM")
    assert ours == plain


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
        "transformers serve --trust-remote-code",
    ):
        assert words in text
    save_file(batch, tmp_path / "sparse-inputs.safetensors")
    done = offline("-c", TRUSTED, tmp_path / "sparse")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "sparse-output.safetensors")
    set_mode(model.eval(), "sparse")
    for name in ("auto", "pipeline", "lm_eval"):
        assert relative_error(found[name], output(model, batch)) < 1e-6, name
    written = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found["written"], written)
    export(tmp_path / "sparse", "dense", tmp_path / "dense")
    assert "auto_map" not in (tmp_path / "dense" / "config.json").read_text()


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
