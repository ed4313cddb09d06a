"""Where the FFNs of a transformers model are: one row per family, and the only place that knows any by name.

A row says what the FFN's module class is called and what its projections are called inside it. A model whose type
has no row is described by the user in the same three words: `Family(ffn="MyMLP", up="fc1", down="fc2")`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from switchable.errors import InputError, nearest
from switchable.ranks import permute


@dataclass(frozen=True)
class Family:
    """How to find an FFN and its parts: FFN(x) = dropout(down(act(up(x))))."""

    ffn: str
    """Class name of the FFN's module, e.g. `"GPT2MLP"`."""
    up: str
    """Attribute of the input projection (`nn.Linear` or transformers' `Conv1D`)."""
    down: str
    """Attribute of the output projection."""
    activation: str = "act"
    """Attribute that holds the activation module."""
    dropout: str | None = None
    """Attribute of the dropout behind the output projection, if there is one."""
    layers: str = "num_hidden_layers"
    """Attribute of the model's config that says how many FFNs there must be."""


FAMILIES: dict[str, Family] = {
    "gpt2": Family(ffn="GPT2MLP", up="c_fc", down="c_proj", dropout="dropout"),
}

PROJECTIONS = (nn.Linear, Conv1D)
"""The modules that a projection may be. In annotations both are `nn.Linear`: they share `weight` and `bias`."""


def family_of(model: nn.Module) -> Family:
    """Return the row for a transformers model.

    Raises:
        InputError: the model's type has no row (the message says how to describe it).
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise InputError(
        f"model type {model_type!r} is not known; known: {', '.join(FAMILIES)}"
        f"{nearest(str(model_type), FAMILIES)}. Describe it yourself: "
        'convert(model, config, family=Family(ffn="<class of the FFN module>", up="<name>", down="<name>"))'
    )


def find_ffns(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of every FFN, in the order of the model; all of them or an error.

    Raises:
        InputError: none found, fewer or more than the model's config names, or a part is missing or of a wrong type.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ == family.ffn]
    expected = getattr(getattr(model, "config", None), family.layers, None)
    if not found or (expected is not None and len(found) != expected):
        kinds = sorted({type(m).__name__ for m in model.modules() if list(m.children())})
        raise InputError(
            f"found {len(found)} of {expected if expected is not None else '?'} FFNs of class {family.ffn!r}; "
            f"the model's module classes are {', '.join(kinds)}. Pass family=Family(ffn=..., up=..., down=...)"
        )
    for name, module in found:
        for part in (family.up, family.down):
            if not isinstance(getattr(module, part, None), PROJECTIONS):
                raise InputError(
                    f"{name}.{part} is {type(getattr(module, part, None)).__name__}; it must be nn.Linear or Conv1D. "
                    f"Parts of {name}: {', '.join(n for n, _ in module.named_children())}"
                )
    return found


def neurons_first(projection: nn.Linear, output: bool) -> Tensor:
    """Return the projection's weight as [F, D], a view: row i belongs to neuron i.

    Args:
        projection: an input (`output=False`) or output projection of an FFN.
        output: whether it is the output projection.
    """
    stored_in_by_out = isinstance(projection, Conv1D)
    weight: Tensor = projection.weight
    return weight if stored_in_by_out == output else weight.T


def activation_name(module: nn.Module) -> str | None:
    """Return the name in transformers' `ACT2FN` of an activation module, or None if it is not a named one."""
    plain: dict[type, str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}
    if type(module) in plain:
        return plain[type(module)]
    return next((name for name in ACT2FN if type(ACT2FN[name]) is type(module)), None)


def build_causal_lm(
    family: str, sizes: dict[str, int], activation: str, vocab_size: int, eos_token_id: int
) -> nn.Module:
    """Return a causal language model with random weights, to pre-train from scratch.

    Args:
        family: model type; this version builds `gpt2`.
        sizes: `d_model`, `d_ff`, `num_layers`, `num_heads`, `max_positions`.
        activation: name of the FFN's activation in `ACT2FN`.
        vocab_size: rows of the embedding.
        eos_token_id: the end-of-text token.

    Raises:
        InputError: a family that cannot be built here.
    """
    builders: dict[str, Callable[..., object]] = {"gpt2": _gpt2_config}
    if family not in builders:
        raise InputError(f"family={family!r} cannot be pre-trained; use one of {', '.join(builders)}")
    return causal_lm(builders[family](sizes, activation, vocab_size, eos_token_id))


def causal_lm(config: object) -> nn.Module:
    """Return the causal language model of a transformers config, with random weights."""
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    # transformers guesses the loss from the class's name, and warns where the name does not tell (GPT2LMHeadModel).
    cast(Any, model).loss_type = "ForCausalLM"
    return model


def _gpt2_config(sizes: dict[str, int], activation: str, vocab_size: int, eos_token_id: int) -> object:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=sizes["max_positions"],
        n_embd=sizes["d_model"],
        n_inner=sizes["d_ff"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )


def permute_neurons(
    projection: nn.Linear, output: bool, perm_F: Tensor, tensor: Tensor, is_bias: bool
) -> None:
    """Reorder in place one tensor that is shaped like a projection's weight or bias: neuron perm[i] becomes i.

    Args:
        projection: the projection the tensor belongs to.
        output: whether it is the FFN's output projection, whose bias does not belong to neurons.
        perm_F: new row i is old row perm_F[i].
        tensor: the weight or bias itself, its gradient, or an optimizer's moment of the same shape.
        is_bias: whether the tensor is shaped like the bias.
    """
    if is_bias:
        dim = None if output else 0
    else:
        stored_in_by_out = isinstance(projection, Conv1D)
        dim = 0 if stored_in_by_out == output else 1
    if dim is not None:
        permute(tensor, dim, perm_F)
