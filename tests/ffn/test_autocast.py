"""A sparse layer under autocast: what is rounded, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from switchable import SwitchConfig, convert, set_mode
from switchable.compute.cpu.limits import has_pairs
from switchable.ffn.layer import SwitchableFFN

Make = Callable[..., nn.Module]


class Casts(TorchDispatchMode):
    """Counts how often a tensor of each shape is rounded to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not has_pairs(), reason="without the instruction a choice is made from unrounded inputs")
def test_what_autocast_rounds_for_experts_and_router_is_rounded_once(
    make_gpt2: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gpt2("relu", width=32)
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    set_mode(model, "sparse")
    mlp = model.transformer.h[0].mlp.train()
    x_BSD = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))

    def outcome() -> tuple[dict[str, Tensor], Counter[tuple[int, ...]]]:
        mlp.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            y_BSD = mlp(x_BSD)
        y_BSD.square().sum().backward()
        return {"y": y_BSD, **{name: each.grad for name, each in mlp.named_parameters()}}, casts.counts

    shared, casts = outcome()
    monkeypatch.setattr(SwitchableFFN, "_rounded", lambda *_: None)
    alone, more = outcome()
    for name, wanted in alone.items():
        if name.startswith("router"):  # what it learns was added up in another order
            assert relative_error(shared[name], wanted) < 1e-2, name
        else:
            assert torch.equal(shared[name], wanted), name
    input_shape, weight_shape = (80, 32), (128, 32)  # both weights, stored as [F, D]
    as_stored = (32, 128)  # of `up`, by autocast for what the router learns
    assert [casts[shape] for shape in (input_shape, weight_shape, as_stored)] == [1, 2, 0]
    assert [more[shape] for shape in (input_shape, weight_shape, as_stored)] == [2, 2, 1]


def test_autocast_leaves_float64_alone(make_gpt2: Make) -> None:
    model = make_gpt2("relu", width=32).double()
    convert(model, SwitchConfig(num_experts=8, experts_per_token=3))
    set_mode(model, "sparse")
    mlp = model.transformer.h[0].mlp.train()
    x_BSD = torch.randn(2, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        under = mlp(x_BSD)
    assert torch.equal(under, mlp(x_BSD))
