"""README.md in a folder with a model: the three lines that open it."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from switchable.ffn.convert import layers_of

PLAIN = """\
from transformers import AutoTokenizer, {kind}
model = {kind}.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})"""
SPARSE = """\
from switchable import load, set_mode
model, tokenizer = load({name!r})
set_mode(model, {mode!r})"""
TEXTS = {
    "dense": (PLAIN, "A plain checkpoint: nothing in it needs switchable."),
    "sparse": (
        SPARSE,
        "It is a plain dense checkpoint too: transformers' `from_pretrained` opens it without switchable.",
    ),
}
"""What a folder holds -> the lines, and what else to know."""
ACTIVATION = (
    "Its FFNs compute {name}, as config.json says. A program that assumes another activation for this type of "
    "model, as mlx-lm does for Llama, gives other answers."
)


def readme(model: nn.Module, to: str, name: str, has_tokenizer: bool) -> str:
    """Return the README of the folder `name`; `to` is a key of TEXTS."""
    lines, more = TEXTS[to]
    mode = "sparse" if any(layer.ssd.takes_part for layer in layers_of(model)) else "dense"
    code = lines.format(kind=class_name(model), name=name, mode=mode).splitlines()
    if not has_tokenizer:
        code = [line.replace("AutoTokenizer, ", "") for line in code if not line.startswith("tokenizer")]
    said = "\n".join(code)
    computes = [ACTIVATION.format(name=layer.ssd.settings.activation) for layer in layers_of(model)[:1]]
    more = "\n\n".join([more, *computes])
    return f"# {name}\n\nFrom the folder in which this one lies:\n\n```python\n{said}\n```\n\n{more}\n"


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class in transformers."""
    # fully_shard gives a model a class of its own, derived from the model's.
    return (type(model).__mro__[1] if isinstance(model, FSDPModule) else type(model)).__name__
