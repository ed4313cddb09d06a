"""Text is written on processors that lack instructions which this one may have, and with other defaults of torch."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from compute.machines import needs_instructions
from launch import run_forked
from support import relative_error
from transformers import PreTrainedModel

from switchable import Controller, SwitchConfig, convert, set_mode
from switchable.compute.cpu.llvm import this_machine
from switchable.ffn.builders import build_model
from switchable.infer.decoding.decoder import Decoder
from switchable.infer.decoding.matrices import WIDTHS

pytestmark = [
    needs_instructions,
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"), reason="limits are those of x86"
    ),
]
SIZES = {"d_model": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2, "max_positions": 128}


def converted(family: str, mode: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build_model(family, SIZES, "relu2", 50, {"eos_token_id": 0})
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    set_mode(model, mode)
    return model


def logits(model: PreTrainedModel, width: str) -> list[list[float]]:
    """After a prompt of 40 tokens, and after two tokens more, by the layers themselves first."""
    ids_BS = torch.arange(80).view(2, 40) % 50
    own = model.to(torch.float32 if width == "float32" else torch.bfloat16).eval()
    with torch.no_grad():
        found = [own(input_ids=ids_BS).logits[:, -1]]
    decoder = Decoder(model, width)
    found.append(decoder.begin(ids_BS, places=64))
    found += [decoder.next(torch.tensor([7, 8])) for _ in range(2)]
    return [each.float().flatten().tolist() for each in found]


def told() -> None:
    """Print the logits of all, and how wide this processor's vectors are."""
    cases = [(f, w, m) for f in ("gpt2", "llama") for w in WIDTHS for m in ("dense", "sparse")]
    this_machine.cache_clear()  # asked for when this file was imported, before the limit was set
    machine = this_machine()
    assert machine is not None
    print(
        json.dumps([machine.vector_bytes, machine.pairs, [logits(converted(f, m), w) for f, w, m in cases]])
    )


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_nothing_is_asked_of_a_processor_that_it_lacks(
    limit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_forked(told, folder=tmp_path, ONEDNN_MAX_CPU_ISA=limit)
    assert done.returncode == 0, done.stderr
    vector_bytes, pairs, found = json.loads(done.stdout)
    assert vector_bytes == 32 or limit == "AVX512_CORE"
    assert not pairs
    told()
    *_, expected = json.loads(capsys.readouterr().out)
    for ours, theirs in zip(expected, found, strict=True):
        assert relative_error(torch.tensor(theirs), torch.tensor(ours)) < 0.05


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("width", WIDTHS)
def test_memory_is_of_the_dtype_that_the_loops_write(width: str, mode: str, default: torch.dtype) -> None:
    """Under a default of half the bytes they wrote behind it."""
    expected, model = logits(converted("gpt2", mode), width), converted("gpt2", mode)
    torch.set_default_dtype(default)
    try:
        found = logits(model, width)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_a_run_switches_whatever_the_default_dtype(default: torch.dtype) -> None:
    model = build_model("gpt2", SIZES, "relu2", 50, {"eos_token_id": 0})
    config = SwitchConfig(num_experts=8, experts_per_token=3, monitor_every=2, recipe="auto", mass_target=0.5)
    convert(model, config)
    ids_BS = torch.arange(256).view(4, 64) % 50
    torch.set_default_dtype(default)
    try:
        controller = Controller(model, ids_BS, total_steps=8)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(8):
            model(input_ids=ids_BS, labels=ids_BS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step(optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert controller.regroupings > 0
