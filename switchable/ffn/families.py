"""Where the FFNs of a model are: what is said of them, and how they are found by it.

A family says what the class is called that holds the FFN's projections, and what they are called in it. The class is
either the FFN and nothing else (`GPT2MLP`: the switchable FFN takes its place), or a whole layer that calls the
projections among other things (`OPTDecoderLayer`, `BertLayer`: `in_layer=True`; the layer's own forward stays, and
the switchable FFN goes where its projections were, see `placement.py`).

The usual ones are rows of a table (`table.py`), others are found by their structure (`finder.py`), or described by the
user in the same words: `Family(ffn="MyMLP", up="fc1", down="fc2")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from switchable.compute.activations import RELU_TYPES, names
from switchable.errors import InputError
from switchable.options import check
from switchable.ranks import has_plain_type

FUSED = ("gate-up", "up-gate", "gate-up-interleaved", "up-gate-interleaved")
"""How the rows of two projections lie in one: which comes first, in two halves or row by row."""


@dataclass(frozen=True)
class Family:
    """How to find an FFN and its parts.

        FFN(x) = down(dropout(act(up(x))))      or, gated,      down(dropout(act(gate(x)) * up(x)))

    Parts are dotted paths of submodules.
    """

    ffn: str | tuple[str, ...]
    """Class name of the module that holds the projections, e.g. `"GPT2MLP"`, or the end of its path in the model, e.g.
    `"h.0.mlp"`; several if encoder and decoder differ."""
    up: str
    """The input projection (`nn.Linear`, or transformers' `Conv1D` unless `in_layer`)."""
    down: str
    """The output projection."""
    activation: str | None = "act"
    """The activation's module; None if it is a function: then `activation_fn`."""
    gate: str | None = None
    """In a gated FFN the projection under the activation; `up` is then what it is multiplied with."""
    hidden_dropout: str | None = None
    """The dropout between the projections: an `nn.Dropout`, or, `in_layer`, also a float attribute of the layer."""
    dropout: str | None = None
    """The `nn.Dropout` behind the output projection, where it belongs to the FFN's module."""
    in_layer: bool = False
    """Whether `ffn` is a layer whose forward does other things too."""
    layers: str = "num_hidden_layers"
    """Attribute of the model's config that says how many FFNs there must be, in the encoder if there are two sides."""
    decoder_layers: str | None = None
    """The same for the decoder of an encoder-decoder model."""
    activation_setting: str = "hidden_act"
    """Attribute of the model's config that names the activation."""
    activation_fn: str | None = None
    """The activation's name in transformers' `ACT2FN` where it is no module, e.g. `"relu2"`."""
    fused: str | None = None
    """Where gate and up are one projection (then `gate` and `up` name it): one of `FUSED`."""

    def __post_init__(self) -> None:
        check(self)
        if (self.activation is None) != (self.activation_fn is not None):
            raise InputError("say activation (a module), or activation=None and activation_fn (its name)")
        if self.activation_fn not in (None, *RELU_TYPES) and self.activation_fn not in names():
            raise InputError(f"activation_fn={self.activation_fn!r}; use one of {', '.join(names())}")
        if self.fused is not None and (self.fused not in FUSED or self.gate != self.up):
            raise InputError(f"fused={self.fused!r}; use one of {', '.join(FUSED)}, one name for gate and up")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Family:
        """Return the family that `dataclasses.asdict` and JSON were given."""
        ffn = values["ffn"]
        return cls(**{**values, "ffn": ffn if isinstance(ffn, str) else tuple(ffn)})

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, as a tuple."""
        return (self.ffn,) if isinstance(self.ffn, str) else self.ffn

    @property
    def projections(self) -> tuple[str, ...]:
        """The paths of the projections, in the order in which they are called."""
        return tuple(dict.fromkeys(path for path in (self.gate, self.up, self.down) if path is not None))

    def expected(self, model: nn.Module) -> int | None:
        """Return how many FFNs the model's config names, or None if it does not say."""
        config = getattr(model, "config", None)
        own: int | None = getattr(config, self.layers, None)
        if self.decoder_layers is None or own is None:
            return own
        decoder = int(getattr(config, self.decoder_layers))
        if getattr(config, "is_encoder_decoder", False):
            return own + decoder
        return decoder if getattr(config, "is_decoder", False) else own


PROJECTIONS = (nn.Linear, Conv1D)
"""The modules that a projection may be. In annotations both are `nn.Linear`: they share `weight` and `bias`."""

HOW_TO_DESCRIBE = """describe the model in three lines:
    from switchable import Family, convert
    family = Family(ffn="<class of the FFN's module>", up="<input projection>", down="<output projection>")
    convert(model, config, family=family)
(docs/families.md: gated FFNs, FFNs without a module of their own, models with two sides)"""


def find_ffns(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """Return (name, module that holds the projections) of every FFN, in the model's order; all of them or an error.

    Raises:
        InputError: none found, fewer or more than the model's config names, or a part is missing or of a wrong type.
    """
    found = [(name, module) for name, module in model.named_modules() if is_one(name, module, family)]
    expected = family.expected(model)
    if not found or (expected is not None and len(found) != expected):
        raise InputError(
            f"found {len(found)} of {expected if expected is not None else '?'} FFNs of class "
            f"{' or '.join(map(repr, family.classes))}. {candidates(model)}; {HOW_TO_DESCRIBE}"
        )
    for name, module in found:
        _check_parts(name, module, family)
    return found


def is_one(name: str, module: nn.Module, family: Family) -> bool:
    """Whether a module is meant by a family's `ffn`; of two paths one may lead from farther up, as under a head."""
    if type(module).__name__ in family.classes or name in family.classes:
        return True
    paths = [path for path in family.classes if "." in path and "." in name]
    return any(f".{name}".endswith(f".{path}") or f".{path}".endswith(f".{name}") for path in paths)


def _check_parts(name: str, module: nn.Module, family: Family) -> None:
    """Raise InputError if a part of an FFN is missing or not of the type it must have."""
    children = dict(module.named_modules())
    is_number = family.in_layer and isinstance(
        getattr(module, family.hidden_dropout or "", None), float | int
    )
    kinds: list[tuple[str | None, tuple[type, ...]]] = [
        *((part, (nn.Linear,) if family.in_layer else PROJECTIONS) for part in family.projections),
        (family.activation, (nn.Module,)),
        (family.dropout, (nn.Dropout,)),
        (None if is_number else family.hidden_dropout, (nn.Dropout,)),
    ]
    for projection in family.projections:
        _check_plain_weight(f"{name}.{projection}", children.get(projection))
    for part, allowed in kinds:
        refuse_adapter(f"{name}.{part}", children.get(part or ""))
        if part is not None and not isinstance(children.get(part), allowed):
            wanted, there = " or ".join(kind.__name__ for kind in allowed), ", ".join(filter(None, children))
            kind, is_there = type(children.get(part)), part in children
            what = f"{kind.__module__}.{kind.__name__}" if is_there else "missing"
            merge = " (adapters are merged first; peft: merge_and_unload())" if is_there else ""
            raise InputError(f"{name}.{part} is {what}; it must be {wanted}{merge}. Parts of {name}: {there}")


def refuse_adapter(name: str, module: nn.Module | None) -> None:
    """Raise InputError if a module wraps a projection, as peft's do."""
    if hasattr(module, "base_layer"):
        raise InputError(
            f"{name} ({type(module).__name__}) is an adapter; merge it into the weight (peft: merge_and_unload()) "
            "before convert"
        )


def _check_plain_weight(name: str, projection: nn.Module | None) -> None:
    """Raise InputError if a projection's weight is computed from others, or its numbers are not floats of torch."""
    if projection is not None and parametrize.is_parametrized(projection):
        raise InputError(  # before its weight is looked at: that can change it
            f"{name} has a parametrization, which would not move with the neurons; remove it first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    weight = getattr(projection, "weight", None)
    floats = isinstance(weight, Tensor) and weight.is_floating_point() and has_plain_type(weight)
    if (isinstance(weight, Tensor) and not floats) or "quantized" in type(projection).__module__:
        raise InputError(f"{name} is quantised; load the model unquantised")


def candidates(model: nn.Module) -> str:
    """Say which classes of the model hold two or more projections: the FFN is among them."""
    seen: dict[str, str] = {}
    for module in model.modules():
        own = {n: child for n, child in module.named_children() if isinstance(child, PROJECTIONS)}
        if len(own) >= 2:
            shapes = ", ".join(f"{n} {tuple(child.weight.shape)}" for n, child in own.items())
            seen.setdefault(type(module).__name__, shapes)
    if not seen:
        return "No module of it holds two projections (nn.Linear or Conv1D)"
    return "Its modules with two or more projections: " + "; ".join(f"{k} ({v})" for k, v in seen.items())


def neuron_dim(projection: nn.Linear, output: bool) -> int:
    """Return which dimension of an FFN's input or output projection's weight belongs to neurons."""
    stored_in_by_out = isinstance(projection, Conv1D)
    return 0 if stored_in_by_out == output else 1


def neurons_first(projection: nn.Linear, output: bool) -> Tensor:
    """Return the projection's weight as [F, D], a view: row i belongs to neuron i."""
    weight: Tensor = projection.weight
    return weight if neuron_dim(projection, output) == 0 else weight.T


def halves(both: Tensor, fused: str, dim: int) -> tuple[Tensor, Tensor]:
    """Return the gate's and the up projection's part of what a fused one has of both, or returns, as views."""
    at, interleaved = dim % both.ndim, fused.endswith("interleaved")
    pairs = torch.unflatten(both, at, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(at + interleaved)
    return (first, second) if fused.startswith("gate") else (second, first)


def d_in(projection: nn.Module) -> int:
    """Return the width of what a projection reads."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.shape[0 if isinstance(projection, Conv1D) else 1]
