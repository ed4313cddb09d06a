"""The ways a model is evaluated in: dense, and sparse with each of a range of K, or up to K for a mass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from switchable.ffn.convert import check_sparse, in_mode, layers_of


@dataclass(frozen=True)
class Way:
    """How the FFNs multiply."""

    mode: str  # `"dense"` or `"sparse"`
    experts_per_token: int | tuple[int | None, ...] | None = None
    """K in sparse mode; for each FFN where they differ, None for one that stays dense."""
    mass: float = 1.0  # below 1: the fewest of K experts whose shares add up to it

    def __str__(self) -> str:
        if self.mode == "dense":
            return "dense"
        k = self.experts_per_token
        sparse = [each for each in k if each is not None] if isinstance(k, tuple) else []
        shown = f"{min(sparse)}-{max(sparse)}" if sparse else k
        return f"sparse K={shown}" if self.mass == 1 else f"sparse K<={shown} mass={self.mass:g}"


def ways(
    model: nn.Module,
    modes: Sequence[str] = (),
    experts_per_token: Sequence[int] = (),
    masses: Sequence[float] = (),
) -> list[Way]:
    """Return the ways to evaluate a model in.

    `modes` are `"dense"`, `"sparse"`; empty: both, or dense alone if no layer takes part in sparse mode.
    `experts_per_token` has values of K for sparse mode; the model's own comes last, to compare them with. With `masses`
    all these come again as the most experts of a token, once for each. Raises InputError for an impossible K, or sparse
    mode of a model that has none.
    """
    layers = [layer.ssd for layer in layers_of(model)]
    if "sparse" in modes or experts_per_token or masses:
        check_sparse(model)
    for k in experts_per_token:
        layers[0].checked_experts_per_token(k)
    found = [Way("dense")] if "dense" in modes or not modes else []
    own = tuple(ssd.experts_per_token if ssd.takes_part else None for ssd in layers)
    values = set(own) - {None}
    if values and ("sparse" in modes or not modes):
        each = [*experts_per_token, own if len(values) > 1 else values.pop()]
        own_mass = layers[0].mass if layers[0].mass not in masses else 1.0
        found += [Way("sparse", k, mass) for mass in (own_mass, *masses) for k in dict.fromkeys(each)]
    return found


@contextmanager
def multiplying(model: nn.Module, way: Way) -> Iterator[None]:
    """Within the block the model is in evaluation mode and multiplies this way; afterwards as before."""
    with in_mode(model, way.mode, way.experts_per_token, way.mass if way.mode == "sparse" else None):
        model.eval()
        yield
