"""Checkpoints: whole or absent, damage found by checksum, readable by plain transformers without this package."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from switchable import InputError, set_mode
from switchable.data.tokenizers import train_bpe
from switchable.store import checkpoint, folders, tensorfile
from switchable.store.find import find_model, load_tokenizer_of, trained_precision
from switchable.store.load import load

PLAIN = """
import json, sys
try:
    import switchable
except ImportError:
    pass
else:
    sys.exit("this process must not be able to import switchable")
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
ids = torch.tensor(json.loads(sys.argv[2]))
torch.save(model.eval()(input_ids=ids).logits, sys.argv[3])
"""


def test_a_checkpoint_is_a_plain_model_for_a_process_without_this_package(
    switchable_gpt2: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "model", switchable_gpt2)
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    # -I and another folder: neither the working tree nor an editable install is on the path.
    site = [p for p in sys.path if p.endswith("site-packages")]
    blocked = f"import sys; sys.path += {site!r}; sys.modules['switchable'] = None; sys.argv = sys.argv[1:]; "
    command = blocked + "exec(open(sys.argv[0]).read())"
    logits = tmp_path / "logits.pt"
    arguments = [str(script), str(tmp_path / "model"), json.dumps(tokens.tolist()), str(logits)]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", command, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = switchable_gpt2.eval()(input_ids=tokens).logits
    torch.testing.assert_close(torch.load(logits, weights_only=True), expected)


def test_what_was_saved_loads_in_both_modes(
    switchable_gpt2: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    switchable_gpt2.eval()
    checkpoint.save(tmp_path / "model", switchable_gpt2)
    loaded, tokenizer = load(tmp_path / "model")
    assert tokenizer is None
    for mode in ("dense", "sparse"):
        set_mode(loaded, mode)
        set_mode(switchable_gpt2, mode)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=tokens).logits, switchable_gpt2(input_ids=tokens).logits), (
                mode
            )


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "switchable.tensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_found(switchable_gpt2: nn.Module, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "model"
    checkpoint.save(folder, switchable_gpt2)
    assert folders.verify(folder) is None
    path = folder / name
    if damage == "flipped":
        flip_a_bit(path)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    found = folders.verify(folder)
    assert found is not None
    if name != "manifest.json":
        assert name in found
    with pytest.raises(InputError, match=r"is damaged|does not exist|neither"):
        load(folder)


@pytest.mark.parametrize("place", ["model", "tensors", "manifest"])
def test_a_full_disk_leaves_the_older_checkpoint_alone(
    switchable_gpt2: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "model"
    checkpoint.save(folder, switchable_gpt2)
    before = load_file(folder / "model.safetensors")

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module, target = {
        "model": (tensorfile, "create"), "tensors": (tensorfile, "write"), "manifest": (folders, "write_json")
    }[place]  # fmt: skip
    monkeypatch.setattr(module, target, full)
    with torch.no_grad():
        next(switchable_gpt2.parameters()).zero_()
    with pytest.raises(InputError, match=r"no space left on the device while saving .*--resume"):
        checkpoint.save(folder, switchable_gpt2)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert folders.verify(folder) is None
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_find_model_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; give the folder of a run"):
        find_model(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no finished run and no checkpoint"):
        find_model(tmp_path)


def test_a_run_is_found_from_the_folder_of_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("train: {precision: bfloat16}\n")
    train_bpe(["the cat"] * 3, 260).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert trained_precision(Path("step-000001")) == "bfloat16"
    assert load_tokenizer_of(Path("step-000001")) is not None
