"""The experts that a folder tells of, put into its plain model.

    written by                                              routers and descriptions of the FFNs
    a run, `switchable convert`, `export --to sparse`       switchable.tensors, where other programs do not look
    `model.save_pretrained`, transformers' Trainer          among the weights, the only place that there is
    older runs                                              switchable.json, .tensors (before that .safetensors)
    older sparse exports                                    config.json as a "quantization_config", and the weights

A description lies with its router (`ffn/description.py`). That of an older folder is made into the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from switchable.errors import InputError
from switchable.ffn.convert import convert, is_router_parameter, layers_of
from switchable.ffn.description import decoded, take_over
from switchable.ffn.families import Family
from switchable.ffn.placement import CHILD
from switchable.files import read_json
from switchable.settings import SwitchConfig
from switchable.store.contents import NEURON_IDS, own_tensors
from switchable.store.pretrained import METHOD
from switchable.store.tensorfile import TensorFile

DESCRIPTION = ".router._extra_state"
"""Ending of the name under which an FFN's description is stored; `_extra_state` is torch's."""
Stored = dict[str, tuple[TensorFile, str]]
"""Name of a tensor, as if the FFN stood in the model's own place -> its file, and its name there."""


def restore_experts(folder: Path, model: nn.Module) -> bool:
    """Make the plain model of a folder switchable, with the folder's experts and routers, under any head.

    `h.0.mlp` of one model may be `transformer.h.0.mlp` of the other. Returns whether there are experts: a plain
    checkpoint has none, and the model stays as it is.

    Raises:
        InputError: they do not fit the model, are damaged, of a later version, or those of a mixture of experts with
            scaled outputs.
    """
    stored = _stored(folder)
    if described := descriptions(folder, stored):
        try:
            _restore(model, described, stored)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            what, _, _how_to_describe = str(error).partition(". ")
            raise InputError(f"the experts of {folder} do not fit its model: {what}") from None
    return bool(described)


def _restore(model: nn.Module, described: Mapping[str, Mapping[str, Any]], stored: Stored) -> None:
    first = next(iter(described.values()))
    if first.get("gate", "unit") != "unit":
        raise InputError(
            "this model is the baseline `moe` of a comparison: its experts' outputs are scaled, so it has no dense "
            "mode and cannot be opened as a switchable model; its figures are in the comparison's table"
        )
    parts = [each["family"] for each in described.values() if each.get("family")]  # 0.1 wrote none
    families = list(dict.fromkeys(map(Family.from_values, parts)))
    config = SwitchConfig(num_experts=first["num_experts"], experts_per_token=1)
    convert(model, config, families or None, trusted=bool(families))
    if len(described) != len(layers_of(model)):
        raise InputError(f"there are {len(described)} of them for {len(layers_of(model))} FFNs")
    for layer in layers_of(model):
        name = _name_in(described, layer.ssd.name)
        take_over(layer.ssd, described[name])
        for part, parameter in layer.router.named_parameters():
            file, own_name = stored[f"{described[name].get('stored_as', name)}.router.{part}"]
            if file.shape(own_name) != tuple(parameter.shape):
                raise InputError(f"{own_name} has shape {file.shape(own_name)}, not {tuple(parameter.shape)}")
            file.read_into(own_name, parameter)


def _stored(folder: Path) -> Stored:
    own = own_tensors(folder, "switchable")
    files = [TensorFile(path) for path in ([own] if own.is_file() else sorted(folder.glob("*.safetensors")))]
    names = [
        (file, n) for file in files for n in file.names if is_router_parameter(n) or n.endswith(NEURON_IDS)
    ]
    return {name.replace(f".{CHILD}.", "."): (file, name) for file, name in names}


def descriptions(folder: Path, stored: Stored | None = None) -> dict[str, dict[str, Any]]:
    """Return the description of each FFN by its name; none if the folder holds a plain model.

    Raises InputError if a file is damaged, or of a later version.
    """
    found = {}
    stored = _stored(folder) if stored is None else stored
    try:
        for name, (file, own_name) in stored.items():
            if name.endswith(DESCRIPTION):
                layer = decoded(file.tensor(own_name))
                # transformers saves some models, as ViT, under other names than they have.
                found[layer["name"]] = {**layer, "stored_as": name.removesuffix(DESCRIPTION)}
        found = found or _described_by_older(folder, stored)
        if not found and own_tensors(folder, "switchable").is_file():
            raise InputError("nothing describes them; give a whole model")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the experts of {folder} cannot be read: {error}") from None


def _described_by_older(folder: Path, stored: Stored) -> dict[str, dict[str, Any]]:
    if (folder / "switchable.json").is_file():
        whole = read_json(folder / "switchable.json")
    else:
        whole = read_json(folder / "config.json").get("quantization_config") or {}
        if whole.get("quant_method") != METHOD:
            return {}
    layers = whole.pop("layers")
    for name, layer in layers.items():
        layer |= {"why_dense": layer.get("why_dense", ""), **whole}
        if name + NEURON_IDS in stored:
            file, own_name = stored[name + NEURON_IDS]
            layer["neuron_ids"] = file.tensor(own_name).tolist()
    return dict(layers)


def _name_in(described: Mapping[str, Any], name: str) -> str:
    """Return the name that an FFN is described under, its own or one that begins otherwise; InputError if none is."""
    for other in (name, *described):
        if other in described and (f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")):
            return other
    raise InputError(f"none of them is that of {name}; they are another model's")
