"""A trained or converted model for other tools: dense (a plain checkpoint), or sparse (a switchable one).

dense    config.json, *.safetensors, tokenizer: nothing of ours is in it, any tool opens it
sparse   the same, and the routers in a file where other tools do not look: they open the dense model,
         `switchable.load` the switchable one (see `experts.py`), and so does transformers where it is told
         trust_remote_code=True (see `integrations/auto_model.py`)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from torch import nn

from switchable.data.tokenizers import save_tokenizer
from switchable.errors import InputError
from switchable.ffn.convert import check_sparse, is_router_parameter, layers_of, set_mode, why_dense
from switchable.files import (
    check_apart,
    check_writable,
    full_disk_told,
    read_json,
    whole_folder,
    write_json,
    write_text,
)
from switchable.infer.decoding.matrices import WIDTHS
from switchable.infer.decoding.rounded import round_weights
from switchable.store.contents import ROUTERS
from switchable.store.folders import entry, seal
from switchable.store.load import load
from switchable.store.pretrained import SHARD_SIZE, save_plain
from switchable.store.quantised import check_int8, write_int8
from switchable.store.readme import class_name, engines, readme
from switchable.store.tensorfile import METADATA

AUTO_CLASSES = {
    "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForMaskedLM": transformers.MODEL_FOR_MASKED_LM_MAPPING,
    "AutoModelForSeq2SeqLM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "AutoModelForSequenceClassification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
"""Classes that look at a config's `auto_map`, with those that they open."""
SERVES = "AutoModelForDecision"
"""What `transformers serve` tries first for any model: the only one by which it reads `auto_map`."""
CODE = "modeling_switchable"
"""Module of a sparse folder that transformers reads where it may."""


def export(
    folder: Path,
    to: str,
    out: Path,
    experts_per_token: int | Sequence[int] | None = None,
    max_shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
    weights: str | None = None,
) -> dict[str, Any]:
    """Export the model of a run, a checkpoint or a converted model.

    Args:
        folder: as for `load`.
        to: `"dense"` or `"sparse"`.
        out: the folder to write, complete or not at all.
        experts_per_token: K that the sparse folder starts with, one for all layers or one for each; None keeps it.
        max_shard_size: largest file of weights, e.g. `"5GB"`.
        overwrite: replace a model that is there.
        weights: `"float32"` or `"bfloat16"`: of the weights written; `"int8"`, sparse alone: in 8 bits besides
            (`quantised.py`); None: as they are.

    Returns:
        What was written: `out`, `to`, `parameters`, `weight_files`, `bytes`; of a switchable model the experts too.

    Raises:
        InputError: nothing to export, no sparse mode, a bad K, or an output folder that is in use.
    """
    if to not in ("dense", "sparse"):
        raise InputError(f"to={to!r} is not known; use 'dense' or 'sparse'")
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", max_shard_size):
        raise InputError(f"max_shard_size={max_shard_size!r} is not a size; use e.g. 5GB or 500MB")
    if weights not in (None, *WIDTHS):
        raise InputError(f"weights={weights!r} is not known; use one of {', '.join(WIDTHS)}")
    if weights == "int8" and to == "dense":
        raise InputError("other tools cannot read our 8 bits; use weights=bfloat16, or to=sparse")
    check_output(out, overwrite, sources=(folder,))
    model, tokenizer = load(folder)
    if weights == "int8":
        check_int8(model)
    elif weights is not None:
        round_weights(model, weights)
    if to == "sparse":
        check_sparse(model)
    if experts_per_token is not None:
        set_mode(model, "dense", experts_per_token)
    remedy = "what was there before stands. Free some space and start again"
    with full_disk_told(f"writing {out}", remedy), whole_folder(out) as temporary:
        save_plain(temporary, model, max_shard_size)
        if to == "sparse":
            _add_experts(temporary, model, in_8_bits=weights == "int8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        write_text(temporary / "README.md", readme(model, to, out.resolve().name, tokenizer is not None))
    written = [p for n, p in model.named_parameters() if to == "sparse" or not is_router_parameter(n)]
    facts: dict[str, Any] = {
        "out": str(out),
        "to": to,
        "parameters": sum(p.numel() for p in written),
        "weight_files": len(list(out.glob("*.safetensors"))),
        "bytes": sum(path.stat().st_size for path in out.glob("*tensors")),
    }
    if ssds := [layer.ssd for layer in layers_of(model)]:
        facts["num_experts"] = ssds[0].num_experts
        facts["experts_per_token"] = [ssd.experts_per_token for ssd in ssds]
        facts |= {"why_dense": why_dense(model), "engines": engines(model)}
    return facts


def _add_experts(folder: Path, model: nn.Module, in_8_bits: bool) -> None:
    """Make the folder of a plain model a sparse one."""
    routers = {name: each for name, each in model.state_dict().items() if is_router_parameter(name)}
    save_file(routers, folder / ROUTERS, METADATA)
    if in_8_bits:
        write_int8(copy.deepcopy(model), folder)
    # Of the tensors alone: texts such as the README are for everyone to change.
    seal(folder, {path.name: entry(path) for path in folder.glob("*tensors")})
    _name_class(folder, model)


def _name_class(folder: Path, model: nn.Module) -> None:
    """Tell transformers' Auto classes of the class that opens a folder in sparse mode."""
    name, config = class_name(model), read_json(folder / "config.json")
    found = {auto: kinds.get(type(model.config), None) for auto, kinds in AUTO_CLASSES.items()}
    autos = [auto for auto, kind in found.items() if getattr(kind, "__name__", None) == name]
    autos += [SERVES] if "AutoModelForCausalLM" in autos else []
    write_json(folder / "config.json", config | {"auto_map": dict.fromkeys(autos, f"{CODE}.{name}")})
    lines = (
        f"from switchable.integrations.auto_model import sparse_class\n\n{name} = sparse_class({name!r})\n"
    )
    write_text(folder / f"{CODE}.py", lines)


def check_output(
    out: Path, overwrite: bool, sources: Sequence[Path | str], what: str = "model", by: str = "config.json"
) -> None:
    """Raise InputError for an output folder that is not what is to be replaced, or that cannot be written.

    What it holds is told by a file in it.
    """
    check_apart(out, sources)
    check_writable(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / by).is_file():
        raise InputError(f"{out} exists and does not hold a {what}; choose another folder with --out")
    if not overwrite:
        raise InputError(
            f"{out} holds a {what} already; replace it with --overwrite, or choose another folder with --out"
        )
