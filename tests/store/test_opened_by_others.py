"""Programs that know nothing of us open what `save_pretrained` and the sparse export wrote: the dense model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from families.models import inputs, output
from safetensors.torch import load_file, save_file
from store.models import trained
from support import offline

from switchable.data.tokenizers import train_bpe
from switchable.store.checkpoint import save
from switchable.store.export import export

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


SERVED = """
import sys
from switchable.ffn.convert import layers_of
from transformers.cli.serving.model_manager import ModelManager
for trusted in (False, True):
    model, _ = ModelManager(device="cpu", trust_remote_code=trusted).load_model_and_processor(sys.argv[1] + "@main")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert [layer.ssd.mode for layer in layers_of(model)] == ["sparse"] * 2 * trusted
"""


def test_transformers_serve_opens_the_sparse_model_where_it_may(tmp_path: Path) -> None:
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip("needs transformers' server: pip install 'transformers[serving]'")
    model, tokenizer = trained("gpt2"), train_bpe(["the cat sat on a mat " * 9], 257)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(tmp_path / "own", model, tokenizer=tokenizer)
    export(tmp_path / "own", "sparse", tmp_path / "out")
    done = offline("-c", SERVED, tmp_path / "out", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr


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


BY_LM_EVAL = """
import runpy, sys
_, folders, *arguments = sys.argv
for folder in folders.split(","):
    sys.argv = ["lm_eval", *(argument.replace("FOLDER", folder) for argument in arguments)]
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
    for stream in (sys.stdout, sys.stderr):
        print("END OF FOLDER", file=stream)
"""


def test_the_command_of_lm_eval_opens_the_dense_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval: pip install 'switchable[eval]'")
    model, tokenizer = trained("gpt2"), train_bpe(["the cat sat on a mat " * 9], 257)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save(tmp_path / "own", model, tokenizer=tokenizer)
    export(tmp_path / "own", "sparse", tmp_path / "exported")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "data.jsonl").write_text('{"context": "the cat sat on", "word": "a"}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    done = offline(
        "-c", BY_LM_EVAL, f"{tmp_path / 'exported'},{tmp_path / 'saved'}",
        "--model", "hf", "--model_args", "pretrained=FOLDER,max_length=32", "--output_path", "FOLDER/scores",
        "--tasks", "tiny", "--include_path", tmp_path / "tasks", "--device", "cpu", "--batch_size", "1",
        HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (tokenizer(text)["input_ids"] for text in ("the cat sat on", " a"))
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = log_p[len(before) - 1 : -1]
    loss = -sum(float(row[token]) for row, token in zip(rows, after, strict=True))
    said = [stream.split("END OF FOLDER") for stream in (done.stdout, done.stderr)]
    for number, name in enumerate(("exported", "saved")):
        (scores,) = (tmp_path / name / "scores").rglob("*.json")
        found = json.loads(scores.read_text())["results"]["tiny"]["perplexity,none"]
        assert found == pytest.approx(math.exp(loss), rel=1e-3)
        assert any("UNEXPECTED" in parts[number] for parts in said) == (name == "saved")
