"""What is not to be compiled, told to torch's compiler without loading it: it takes 0.1 GB and a second."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that is never traced: `torch.compiler.disable`, applied once there is a compiler."""
    disabled: list[Callable[P, R]] = []

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_dynamo_compiling() and "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    # The compiler counts by code object how often it compiled something anew, and gives up after eight.
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    return functools.wraps(function)(call)
