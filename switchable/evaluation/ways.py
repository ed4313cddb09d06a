"""The ways a model is evaluated in: dense, and sparse with each of a range of K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from switchable.ffn.convert import check_sparse, in_mode, layers_of


@dataclass(frozen=True)
class Way:
    """How the FFNs multiply."""

    mode: str
    """`"dense"` or `"sparse"`."""
    experts_per_token: int | tuple[int | None, ...] | None = None
    """K in sparse mode; for each FFN where they differ, None for one that stays dense."""

    def __str__(self) -> str:
        if self.mode == "dense":
            return "dense"
        if not isinstance(self.experts_per_token, tuple):
            return f"sparse K={self.experts_per_token}"
        sparse = [k for k in self.experts_per_token if k is not None]
        return f"sparse K={min(sparse)}-{max(sparse)}"


def ways(model: nn.Module, modes: Sequence[str] = (), experts_per_token: Sequence[int] = ()) -> list[Way]:
    """Return the ways to evaluate a model in.

    `modes` are `"dense"`, `"sparse"`; empty: both, or dense alone if no layer takes part in sparse mode.
    `experts_per_token` has values of K for sparse mode; the model's own comes last, to compare them with.

    Raises:
        InputError: an impossible K, or sparse mode of a model that has none.
    """
    layers = [layer.ssd for layer in layers_of(model)]
    if "sparse" in modes or experts_per_token:
        check_sparse(model)
    for k in experts_per_token:
        layers[0].check_experts_per_token(k)
    found = [Way("dense")] if "dense" in modes or not modes else []
    own = tuple(ssd.experts_per_token if ssd.takes_part else None for ssd in layers)
    values = set(own) - {None}
    if values and ("sparse" in modes or not modes):
        each = [*experts_per_token, own if len(values) > 1 else values.pop()]
        found += [Way("sparse", k) for k in dict.fromkeys(each)]
    return found


@contextmanager
def multiplying(model: nn.Module, way: Way) -> Iterator[None]:
    """Within the block the model is in evaluation mode and multiplies this way; afterwards as before."""
    with in_mode(model, way.mode, way.experts_per_token):
        model.eval()
        yield
