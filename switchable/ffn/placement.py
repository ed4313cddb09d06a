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

The FFN itself, with the router, becomes one more child of the layer, `switchable_ffn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from switchable.errors import InputError

if TYPE_CHECKING:
    from switchable.ffn.families import Family

CHILD = "switchable_ffn"
"""The name of the FFN among the layer's children."""


class Held(nn.Linear):
    """The parameters of a projection, under their old names; what its forward does is the subclass's."""

    def __init__(self, projection: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = projection.in_features, projection.out_features
        self.weight, self.bias = projection.weight, projection.bias

    def project(self, x: Tensor) -> Tensor:
        """Multiply, as the projection did."""
        return nnf.linear(x, self.weight, self.bias)


class Entrance(Held):
    """Stands where the input projection (of a gated FFN: the one under the activation) was."""

    def __init__(self, projection: nn.Linear, ffn: nn.Module) -> None:
        super().__init__(projection)
        self._ffn = (ffn,)  # in a tuple: a reference, not a child

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output."""
        ffn: Any = self._ffn[0]
        if not torch.compiler.is_compiling():
            _check_held(ffn.ssd.name, ffn.ssd.called[:-1])  # the last is the activation
        y: Tensor = ffn(x)
        return y


def _check_held(name: str, projections: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse what was put around a projection afterwards: the layer and the FFN would call it for different things.

    Raises:
        InputError: names it, and what to do.
    """
    for path, module in projections:
        if not isinstance(module, Held):
            raise InputError(
                f"{name}.{path} has become a {type(module).__name__}, which neither mode can call there; put adapters "
                "on other modules, or merge them into the weight (peft: merge_and_unload())"
            )


class Factor(Held):
    """Stands where the input projection of a gated FFN was that the activation is multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 1."""
        return x.new_ones(())


class Exit(Held):
    """Stands where the output projection was."""

    def forward(self, y: Tensor) -> Tensor:
        """Return what the entrance computed."""
        return y


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """Multiply by a projection's weight and add its bias, wherever the projection stands."""
    y: Tensor = projection.project(x) if isinstance(projection, Held) else projection(x)
    return y


def put_into_layer(layer: nn.Module, family: Family, ffn: nn.Module) -> None:
    """Exchange what the layer's forward calls (see the module's text)."""
    first = family.gate or family.up
    layer.set_submodule(first, Entrance(_linear(layer, first), ffn))
    if family.gate is not None:
        layer.set_submodule(family.up, Factor(_linear(layer, family.up)))
    layer.set_submodule(family.down, Exit(_linear(layer, family.down)))
    layer.set_submodule(family.activation, nn.Identity())
    if family.hidden_dropout is not None:
        setattr(layer, family.hidden_dropout, 0.0)
    layer.add_module(CHILD, ffn)


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} was checked to be nn.Linear"
    return module
