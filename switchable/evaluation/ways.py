"""The ways a model is evaluated in: dense, and sparse with each of a range of K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from switchable.errors import InputError
from switchable.ffn.convert import in_mode, layers_of


@dataclass(frozen=True)
class Way:
    """How the FFNs multiply."""

    mode: str
    """`"dense"` or `"sparse"`."""
    experts_per_token: int | None = None
    """K in sparse mode; None where layers differ and each keeps its own."""
    own: tuple[int, ...] = ()
    """The K of each layer that takes part, where they differ."""

    def __str__(self) -> str:
        if self.mode == "dense":
            return "dense"
        return f"sparse K={f'{min(self.own)} to {max(self.own)}' if self.own else self.experts_per_token}"


def ways(model: nn.Module, modes: Sequence[str] = (), experts_per_token: Sequence[int] = ()) -> list[Way]:
    """Return the ways to evaluate a converted model in.

    `modes` are `"dense"`, `"sparse"`; empty: both, or dense alone if no layer takes part in sparse mode.
    `experts_per_token` has the values of K for sparse mode; empty: the model's own.

    Raises:
        InputError: an impossible K, or sparse mode of a model that was trained all dense.
    """
    layers = layers_of(model)
    experts = layers[0].ssd.num_experts
    can_be_sparse = any(layer.ssd.takes_part for layer in layers)
    if not can_be_sparse and ("sparse" in modes or experts_per_token):
        raise InputError(
            "no layer of this model takes part in sparse mode (it was trained all dense); use --mode dense"
        )
    for k in experts_per_token:
        if not 1 <= k <= experts:
            raise InputError(
                f"experts_per_token={k} is not possible with the model's {experts} experts; use 1 to {experts}"
            )
    found = [Way("dense")] if "dense" in modes or not modes else []
    if can_be_sparse and ("sparse" in modes or not modes):
        own = tuple(layer.ssd.experts_per_token for layer in layers if layer.ssd.takes_part)
        if not experts_per_token and len(set(own)) > 1:
            return [*found, Way("sparse", own=own)]
        found += [Way("sparse", k) for k in dict.fromkeys(experts_per_token or own)]
    return found


@contextmanager
def multiplying(model: nn.Module, way: Way) -> Iterator[None]:
    """Within the block the model is in evaluation mode and multiplies this way; afterwards as before."""
    with in_mode(model, way.mode, way.experts_per_token):
        model.eval()
        yield
