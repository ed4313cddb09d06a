"""A trained or converted model for other tools: dense (a plain checkpoint), or sparse (a switchable one).

dense    config.json, *.safetensors, tokenizer: nothing of ours is in it, any tool opens it
sparse   the same with the routers among the weights; `AutoModelFor...from_pretrained` opens it as a switchable
         model after `switchable.register()` (see `sparse_folder.py`), and without it as the dense model
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from switchable.errors import InputError
from switchable.ffn.convert import is_router_parameter, layers_of, set_mode
from switchable.ffn.description import describe
from switchable.files import whole_folder
from switchable.finite import check_finite
from switchable.store.folders import full_disk_told
from switchable.store.load import load
from switchable.store.pretrained import SHARD_SIZE, save_pretrained
from switchable.store.sparse_folder import METHOD


def export(
    folder: Path,
    to: str,
    out: Path,
    experts_per_token: int | Sequence[int] | None = None,
    max_shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Export the model of a run, a checkpoint or a converted model.

    Args:
        folder: as for `load`.
        to: `"dense"` or `"sparse"`.
        out: the folder to write, complete or not at all.
        experts_per_token: K that the sparse folder starts with, one for all layers or one for each; None keeps it.
        max_shard_size: largest file of weights, e.g. `"5GB"`.
        overwrite: replace a model that is there.

    Returns:
        What was written: `out`, `to`, `parameters`, `weight_files`, `bytes`.

    Raises:
        InputError: nothing to export, a bad K, or an output folder that is in use.
    """
    if to not in ("dense", "sparse"):
        raise InputError(f"to={to!r} is not known; use 'dense' or 'sparse'")
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", max_shard_size):
        raise InputError(f"max_shard_size={max_shard_size!r} is not a size; use e.g. 5GB or 500MB")
    check_output(out, overwrite, sources=(folder,))
    model, tokenizer = load(folder)
    if experts_per_token is not None:
        set_mode(model, "dense", experts_per_token)
    remedy = "what was there before stands. Free some space and start again"
    with full_disk_told(out, remedy), whole_folder(out) as temporary:
        write(model, tokenizer, to, temporary, max_shard_size)
    weights = sorted(out.glob("*.safetensors"))
    return {
        "out": str(out),
        "to": to,
        "parameters": sum(
            p.numel() for n, p in model.named_parameters() if to == "sparse" or not is_router_parameter(n)
        ),
        "weight_files": len(weights),
        "bytes": sum(path.stat().st_size for path in weights),
        "num_experts": layers_of(model)[0].ssd.num_experts,
        "experts_per_token": [layer.ssd.experts_per_token for layer in layers_of(model)],
    }


def write(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, to: str, folder: Path, max_shard_size: str
) -> None:
    """Write a converted model and its tokenizer into a folder that exists; the model's config is as before after.

    Raises:
        InputError: a weight is not finite.
    """
    check_finite(model, "the model", "nothing was written")
    config: Any = model.config
    before = getattr(config, "quantization_config", None)
    try:
        if to == "sparse":
            config.quantization_config = {"quant_method": METHOD, **describe(model)}
        elif before is not None:
            del config.quantization_config
        save_pretrained(folder, model, routers=to == "sparse", max_shard_size=max_shard_size)
    finally:
        if before is not None:
            config.quantization_config = before
        elif to == "sparse":
            del config.quantization_config
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_output(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse an output folder that holds something else than a model to be replaced.

    Raises:
        InputError: says what to do.
    """
    if any(out.resolve() == source.resolve() for source in sources):
        raise InputError(f"{out} is what is read; choose another folder with --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
        raise InputError(f"{out} exists and does not hold a model; choose another folder with --out")
    if not overwrite:
        raise InputError(
            f"{out} holds a model already; replace it with --overwrite, or choose another folder with --out"
        )
