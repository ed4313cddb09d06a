"""README.md in a folder with a model: the three lines that open it."""

from __future__ import annotations

from torch import nn

from switchable.ffn.convert import layers_of
from switchable.ranks import is_unit

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
        "It is a plain dense checkpoint too: transformers' `from_pretrained` opens it without switchable. Told "
        "`trust_remote_code=True` (lm-eval: `--model_args pretrained={name},trust_remote_code=True`; `transformers "
        "serve --trust-remote-code`), `pipeline` and the Auto classes open it in sparse mode, by the two lines of "
        "modeling_switchable.py.",
    ),
}
"""What a folder holds -> the lines, and what else to know."""
ACTIVATION = (
    "Its FFNs compute {name}, as config.json says. A program that assumes another activation for this type of "
    "model, as mlx-lm does for Llama, gives other answers. {llama_cpp}"
)
LLAMA_CPP = {
    "arcee": "relu2", "nemotron": "relu2", "llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu",
    "smollm3": "silu", "granite": "silu", "olmo2": "silu", "gemma": "gelu_pytorch_tanh",
    "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh", "gpt2": "gelu_new", "gpt_neox": "gelu",
    "phi": "gelu_new",
}  # fmt: skip
"""Type of model -> the activation that llama.cpp has built into it, whatever the config says."""


def readme(model: nn.Module, to: str, name: str, has_tokenizer: bool) -> str:
    """Return the README of the folder `name`; `to` is a key of TEXTS."""
    (lines, more), layers = TEXTS[to], layers_of(model)
    mode = "sparse" if any(layer.ssd.takes_part for layer in layers) else "dense"
    code = lines.format(kind=class_name(model), name=name, mode=mode).splitlines()
    if not has_tokenizer:
        code = [line.replace("AutoTokenizer, ", "") for line in code if not line.startswith("tokenizer")]
    said = "\n".join(code)
    more = more.replace("{name}", name)
    if layers:
        own = layers[0].ssd.settings.activation
        more += "\n\n" + ACTIVATION.format(name=own, llama_cpp=engines(model))
    return f"# {name}\n\nFrom the folder in which this one lies:\n\n```python\n{said}\n```\n\n{more}\n"


def engines(model: nn.Module) -> str:
    """Say whether llama.cpp computes a switchable model's own activation, and which type of model would have it."""
    kind, own = str(model.config.model_type), layers_of(model)[0].ssd.settings.activation  # type: ignore[union-attr]
    built_in = LLAMA_CPP.get(kind)
    if built_in == own:
        return f"llama.cpp computes {own} in models of type {kind}, as this one does."
    if built_in is None:
        return f"Of llama.cpp's activation in models of type {kind} nothing is known here: compare losses."
    return (
        f"llama.cpp has {built_in} built into models of type {kind} and would write other text, silently; relu2 "
        "without a gate it computes in models of type arcee (switchable pretrain --family arcee)."
    )


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class in transformers."""
    # fully_shard gives a model a class of its own, derived from the model's.
    return (type(model).__mro__[1] if is_unit(model) else type(model)).__name__
