"""Where a switchable FFN stands in a model whose layers call the FFN's projections themselves.

OPT's and BART's layers hold `fc1` and `fc2` directly, BERT's spread them over two modules, and all call them one
after the other in a forward that does other things too:

    h = activation(fc1(x));   h = dropout(h, p);   y = fc2(h)

That forward stays as it is. What it calls is exchanged:

    fc1          Entrance: holds fc1's parameters under their old names, and returns the whole FFN's output
    activation   nn.Identity
    p            0: the switchable FFN drops out between the projections itself
    fc2          Exit: holds fc2's parameters under their old names, and returns what it is given

(In a gated FFN the entrance is the projection under the activation, and the other one returns the factor 1.)

What is a function there, and not a module, cannot be exchanged: an activation, the cutting in two of a fused gate and
up projection. Then the entrance keeps the output y for the exit, and gives the layer one row of zeros, [1, .., 1, F] or
2F, to apply its functions to; the exit takes no notice of what comes of it. The y kept is the calling thread's own;
a layer that is run anew (gradient checkpointing) or in pieces calls entrance and exit in turns all the same.

The FFN itself, with the router, becomes one more child of the layer, `switchable_ffn`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from switchable.errors import InputError
from switchable.ffn.families import Family

CHILD = "switchable_ffn"
"""The name of the FFN among the layer's children."""


class Held(nn.Linear):
    """The parameters of a projection, under their old names; what its forward does is the subclass's."""

    def __init__(self, projection: nn.Linear) -> None:
        nn.Module.__init__(self)
        vars(self).update({name: value for name, value in vars(projection).items() if name[0] != "_"})
        self.weight, self.bias = projection.weight, projection.bias
        self._multiply = type(projection).forward

    def project(self, x: Tensor) -> Tensor:
        """Multiply, as the projection did."""
        return self._multiply(self, x)


class PerThread(threading.local):
    """Something that every Python thread has its own of; copies of what holds it start anew."""

    held: Any = None

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()


class Entrance(Held):
    """Stands where the input projection (of a gated FFN: the one under the activation) was."""

    def __init__(self, projection: nn.Linear, ffn: nn.Module, kept: PerThread | None) -> None:
        super().__init__(projection)
        self._ffn, self._kept = (ffn,), kept  # in a tuple: a reference, not a child

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output, or keep it and return zeros."""
        ffn: Any = self._ffn[0]
        if not torch.compiler.is_compiling():
            _check_held(ffn.ssd)
        y: Tensor = ffn(x)
        if self._kept is None:
            return y
        self._kept.held = y
        return x.new_zeros(*(1 for _ in x.shape[:-1]), self.out_features)


def _check_held(ssd: Any) -> None:
    """Raise InputError for what was put around a projection since: layer and FFN would call it for different things."""
    for path, module in ssd.projections:
        if not isinstance(module, Held):
            raise InputError(
                f"{ssd.name}.{path} has become a {type(module).__name__}, which neither mode can call there; put "
                "adapters on other modules, or merge them into the weight (peft: merge_and_unload())"
            )


class Factor(Held):
    """Stands where the input projection of a gated FFN was that the activation is multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 1."""
        return x.new_ones(())


class Exit(Held):
    """Stands where the output projection was."""

    def __init__(self, projection: nn.Linear, kept: PerThread | None) -> None:
        super().__init__(projection)
        self._kept = kept

    def forward(self, y: Tensor) -> Tensor:
        """Return what the entrance computed."""
        if self._kept is None:
            return y
        kept: Tensor | None = self._kept.held
        self._kept.held = None
        assert kept is not None, "the layer calls the entrance first"
        return kept


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """Multiply by a projection's weight and add its bias, wherever the projection stands."""
    return projection.project(x) if isinstance(projection, Held) else projection(x)


def put_into_layer(layer: nn.Module, family: Family, ffn: nn.Module) -> Callable[[], None]:
    """Exchange what the layer's forward calls (see the module's text); return what undoes it."""
    kept = PerThread() if family.activation is None or family.fused is not None else None
    projections = {path: cast(nn.Linear, layer.get_submodule(path)) for path in family.projections}
    first = family.gate or family.up
    instead: dict[str, nn.Module] = {first: Entrance(projections[first], ffn, kept)}
    if first != family.up:
        instead[family.up] = Factor(projections[family.up])
    instead[family.down] = Exit(projections[family.down], kept)
    if family.activation is not None and kept is None:
        instead[family.activation] = nn.Identity()
    before = {path: layer.get_submodule(path) for path in instead}
    probability = None
    if family.hidden_dropout is not None:
        probability = getattr(layer, family.hidden_dropout, None)
        if isinstance(probability, float | int):
            setattr(layer, family.hidden_dropout, 0.0)
        else:
            before[family.hidden_dropout] = layer.get_submodule(family.hidden_dropout)
            instead[family.hidden_dropout] = nn.Identity()
    for path, module in instead.items():
        layer.set_submodule(path, module)
    layer.add_module(CHILD, ffn)
    if isinstance(layer, nn.TransformerEncoderLayer):  # in evaluation it takes its weights and calls nothing,
        ffn.register_forward_pre_hook(_stay_away)  # unless there are hooks

    def undo() -> None:
        for path, module in before.items():
            layer.set_submodule(path, module)
        if isinstance(probability, float | int):
            setattr(layer, str(family.hidden_dropout), probability)
        delattr(layer, CHILD)

    return undo


def _stay_away(_ffn: nn.Module, _args: object) -> None:
    """Do nothing: it is enough to be there."""
