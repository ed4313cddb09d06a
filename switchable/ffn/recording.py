"""What the modules of a model are given and give back in one pass, in the order in which they are done.

And that what is changed for such a pass is put back: `kept`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """One call of a module that is given real numbers, and returns some."""

    name: str
    module: nn.Module
    x: Tensor
    """Its first argument, as it was before the call."""
    y: Tensor
    alone: bool
    """Whether it was given nothing else, and by position."""


Modules = Iterable[tuple[str, nn.Module]]
"""By their names."""


@contextmanager
def recorded(modules: Modules, instead: Mapping[str, Tensor] | None = None) -> Iterator[list[Call]]:
    """Within the `with` block note every call of some modules; copies, so that nobody writes over them.

    `instead` is what some modules are made to return, one entry for each of their last dimension.
    """
    calls: list[Call] = []
    hooks = ExitStack()

    def watch(name: str, module: nn.Module) -> None:
        begun: list[tuple[Tensor | None, bool]] = []

        def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next(iter(args or named.values()), None)
            begun.append((_copy(first), len(args) == 1 and not named))

        def after(_module: nn.Module, _args: Any, y: Any) -> Any:
            x, alone = begun.pop()
            if instead is not None and name in instead:
                y = instead[name].to(y.device, y.dtype).expand(y.shape).clone()
            own = _copy(y)
            if x is not None and own is not None:
                calls.append(Call(name, module, x, own, alone))
            return y

        hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(module.register_forward_hook(after))

    with hooks:
        for name, module in modules:
            watch(name, module)
        yield calls


@contextmanager
def kept(things: Iterable[object], *names: str) -> Iterator[None]:
    """After the `with` block these attributes of some things are as they were before."""
    before = [(thing, {name: getattr(thing, name) for name in names}) for thing in things]
    try:
        yield
    finally:
        for thing, values in before:
            for name, value in values.items():
                setattr(thing, name, value)


def _copy(thing: object) -> Tensor | None:
    return thing.clone() if isinstance(thing, Tensor) and thing.is_floating_point() else None


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    return distance(a, b) <= tolerance(b)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, over the largest number of the second; infinite if not finite."""
    if a.numel() != b.numel() or not a.numel():
        return math.inf
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    found = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return found if math.isfinite(found) else math.inf


def tolerance(like: Tensor) -> float:
    """Return the `distance` that rounding may come to."""
    return 4 * torch.finfo(like.dtype).eps if like.element_size() < 4 else 1e-4
