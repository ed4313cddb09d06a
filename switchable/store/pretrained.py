"""Folders in plain Hugging Face form: opened as any job needs them, and written.

Nothing is downloaded, no code of a folder is run, and pickled weights are never read: they can run code too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from switchable.errors import InputError
from switchable.ffn.builders import class_of, name_the_loss
from switchable.ffn.convert import is_router_parameter
from switchable.files import read_json, write_json
from switchable.finite import check_finite

SHARD_SIZE = "5GB"
"""Largest file of weights that an export writes."""
METHOD = "switchable"
"""Older sparse exports name this quantisation method in `config.json`; nothing is quantised."""
HEAD = r"score|classif|pooler|qa_outputs"
"""Weights that a model for a task has and a language model has not: they are drawn anew."""


def load_pretrained(
    folder: Path, config: PreTrainedConfig | None = None, kind: Any = None
) -> PreTrainedModel:
    """Load a plain Hugging Face checkpoint on the CPU, in its own dtype, in evaluation mode.

    `config` takes the place of the folder's, `kind` that of the class of transformers which the config names: its head
    may be new, so that its weights are missing.

    Raises:
        InputError: no such folder, no weights, or weights that do not fit the config or are not finite.
    """
    if config is None:
        config = load_config(folder)
    _check_weights(folder, config)
    try:
        with quiet_transformers():
            model, found = (kind or class_of(config)).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    _check_complete(folder, found, new_head=kind is not None)
    check_finite(model, str(folder), "give a checkpoint from before its training diverged")
    name_the_loss(model)
    return model.eval()


def _check_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a folder without weights, and one whose index, config or adapter names anything pickled."""
    named = [] if (told := getattr(config, "transformers_weights", None)) is None else [str(told)]
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named += map(str, read_json(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is damaged ({error}); give the folder of a whole checkpoint") from None
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds an adapter; merge it into its model and save_pretrained that")
    pickled = [name for name in named if not name.endswith(".safetensors")]
    if not list(folder.glob("*.safetensors")):
        pickled += [path.name for kind in ("*.bin", "*.pt") for path in folder.glob(kind)]
        if not pickled:
            raise InputError(f"{folder} holds no weights (*.safetensors); give a whole checkpoint's folder")
    if pickled:
        raise InputError(
            f"the weights of {folder} are pickled ({', '.join(sorted(set(pickled)))}), which we never open: they can "
            "run code. Load the model where you trust it and save it again with save_pretrained"
        )


def _check_complete(folder: Path, found: Mapping[str, Any], new_head: bool) -> None:
    """Refuse weights that are missing, of another shape, or belong to layers that the config does not have."""
    in_layers = [key for key in found["unexpected_keys"] if re.search(r"\.\d+\.", key)]
    wrong = {
        "missing": sorted(k for k in found["missing_keys"] if not (new_head and re.search(HEAD, k))),
        "of another shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
        "of layers that the config does not have": sorted(k for k in in_layers if not is_router_parameter(k)),
    }
    problems = [f"{len(names)} {what}, e.g. {names[0]}" for what, names in wrong.items() if names]
    if problems:
        raise InputError(f"the tensors of {folder} do not fit its config.json: {'; '.join(problems)}")


def load_config(folder: Path, **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a checkpoint, with some of its settings changed.

    Raises:
        InputError: no such folder, or no readable `config.json` of a model that transformers knows.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changes)
    except Exception as error:
        # What checks the settings' types raises an error of its own, because of one of these.
        expected = (OSError, ValueError, KeyError, TypeError, AttributeError)
        if not isinstance(error, expected) and not isinstance(error.__cause__, expected):
            raise
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{folder / 'config.json'} cannot be used: {why}") from None
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == METHOD:
        del config.quantization_config
    vars(config).pop("auto_map", None)  # a sparse export's: what is written of the model may be a dense one
    return config


def save_plain(folder: Path, model: PreTrainedModel, max_shard_size: str = SHARD_SIZE) -> None:
    """Write the dense model that a converted model is in Hugging Face form, without the routers.

    A model larger than `max_shard_size`, as `"5GB"`, becomes several files and an index. Raises InputError, nothing
    being written, if a weight is not finite.
    """
    check_finite(model, "the model", "nothing was written")
    state = {n: t for n, t in model.state_dict().items() if not is_router_parameter(n)}
    # What was read had transformers 5's names for weights. Unless it remembers that, it writes those of the hub.
    vars(model).pop("_weight_conversions", None)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    name_as_before(folder)


def name_as_before(folder: Path) -> None:
    """Say in `config.json` what transformers 5 has renamed under its older names too, by which other tools read it."""
    path = folder / "config.json"
    config = read_json(path)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    write_json(path, config)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and logging warnings; its settings are put back afterwards."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
