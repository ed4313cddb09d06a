"""A model exported to a type that llama.cpp computes right gives the same probabilities there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from switchable import SwitchConfig, convert
from switchable.ffn.builders import build_model
from switchable.store.checkpoint import save
from switchable.store.export import export
from switchable.store.load import load

pytest.importorskip("gguf", reason="no gguf: pip install gguf")
llama_cpp: Any = pytest.importorskip("llama_cpp", reason="no llama.cpp: pip install llama-cpp-python")

from benchmarks._gguf import write_gguf  # noqa: E402 - needs gguf

SIZES = {"d_model": 64, "d_ff": 256, "num_layers": 2, "num_heads": 4, "max_positions": 64}


def exported(family: str, folder: Path) -> Any:
    """The model of a dense export, with weights large enough for its FFNs to matter."""
    torch.manual_seed(0)
    model = build_model(family, SIZES, "relu2", 96, {"eos_token_id": 0})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and parameter.ndim == 2:
                parameter.normal_(std=0.2)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    save(folder / "own", model)
    export(folder / "own", "dense", folder / "dense")
    return load(folder / "dense")[0]


def logits(model: Any, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return a fixed text's tokens, and what follows each of them: by our logits, and by llama.cpp's."""
    write_gguf(model, folder / "model.gguf")
    ids = torch.randint(1, 96, (48,), generator=torch.Generator().manual_seed(1))
    engine = llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    engine.eval(ids.tolist())
    with torch.no_grad():
        return ids, model(input_ids=ids[None]).logits[0], torch.from_numpy(engine.scores[:48].copy())


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / ours.norm())


def test_arcee_computes_the_same_function_in_llama_cpp(tmp_path: Path) -> None:
    ids, *both = logits(exported("arcee", tmp_path), tmp_path)
    assert relative(*both) < 1e-2
    ours, theirs = (float(cross_entropy(each[:-1], ids[1:])) for each in both)
    assert theirs == pytest.approx(ours, abs=1e-3)


def test_gpt2_does_with_its_own_activation_and_not_with_ours(tmp_path: Path) -> None:
    """Which is what an export warns of; the first half says that the difference is not the file's."""
    _, *own = logits(build_model("gpt2", SIZES, "gelu_new", 96, {"eos_token_id": 0}).eval(), tmp_path)
    assert relative(*own) < 1e-2
    _, *with_relu2 = logits(exported("gpt2", tmp_path), tmp_path)
    assert relative(*with_relu2) > 0.2


def test_the_benchmarks_contender_writes_what_transformers_does_several_sequences_at_once() -> None:
    from benchmarks._llama_cpp import LlamaCpp

    model = build_model("gpt2", SIZES, "gelu_new", 96, {"eos_token_id": 0}).eval()
    ids_BS = torch.randint(1, 96, (3, 5), generator=torch.Generator().manual_seed(2))
    written = model.generate(
        input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=6, min_new_tokens=6,
        do_sample=False, pad_token_id=0, suppress_tokens=None,
    )  # fmt: skip
    calls = LlamaCpp(model).calls(ids_BS, 6)
    assert list(calls) == ["llamacpp_float32", "llamacpp_bf16", "llamacpp_q8_0", "llamacpp_q4_0"]
    assert calls["llamacpp_float32"]() == written[:, 5:].tolist()
    assert calls["llamacpp_float32"]() == written[:, 5:].tolist()  # its cache starts anew
    assert all(np.shape(call()) == (3, 6) for call in calls.values())
