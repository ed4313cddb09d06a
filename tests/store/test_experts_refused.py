"""Experts in a folder that do not fit its model, or are damaged, are refused, and the message says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from store.models import OLDER, trained

from switchable import InputError, load
from switchable.ffn.description import decoded, encoded
from switchable.store import folders
from switchable.store.checkpoint import save
from switchable.store.export import export


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
        ({"experts_per_token": 9}, r"experts_per_token=9 is out of range"),
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
