"""Functions that are not traced, in a compiled one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from switchable.compute.eager import eager


def test_as_many_functions_as_one_likes_in_compiled_ones() -> None:
    """The compiler gives up on a code object that it has compiled eight times, and says so to the user."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(12):
            function = eager(eval(f"lambda x: x + {number}"))  # with code of its own, as functions have
            calls: Callable[[Tensor], Tensor] = eval("lambda x: function(x) * 2", {"function": function})
            assert torch.compile(calls, backend="eager")(torch.ones(())) == 2 * (1 + number)
    torch.compiler.reset()
