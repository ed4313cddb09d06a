"""Where a schedule stands, what it decides after a measurement, and what changes with that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class ScheduleState:
    """Where the schedule stands."""

    takes_part: tuple[bool, ...]
    """Whether each layer is sparse in sparse steps."""
    experts_per_token: tuple[int, ...]
    multiplies_active: tuple[bool, ...]
    """Whether each layer multiplies only its active neurons in dense steps."""
    activation_l1: tuple[float, ...]
    """Each layer's penalty on activations, in nats per unit."""
    estimates: bool = False
    """Whether sparse steps choose experts by products in 8 bits; else the router does."""
    began: int | None = None
    """The step at which alternating began; None before."""
    why_dense: tuple[str, ...] = field(default=(), compare=False)
    """What keeps each layer out of sparse steps: what was measured against which limit; empty where nothing does."""
    activation_ratio: tuple[float, ...] = field(default=(), compare=False)
    """Of each layer, by which it decides in which precisions it pays to leave out idle neurons."""
    gains: tuple[float, ...] = field(default=(), compare=False)
    """How many times the seconds of its sparse step each layer's dense step took; empty where costs do not decide."""

    @property
    def ways(self) -> tuple[str, ...]:
        """What each layer does: `"sparse"` (in sparse steps), else `"active"` or `"dense"`."""
        return tuple(
            "sparse" if part else "active" if active else "dense"
            for part, active in zip(self.takes_part, self.multiplies_active, strict=True)
        )

    def plain(self) -> dict[str, Any]:
        """Return the state as a checkpoint keeps it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> ScheduleState:
        """Return what `plain` was called on; `stored` may hold more."""
        layers = len(stored["takes_part"])
        known = {"why_dense": [""] * layers, "activation_ratio": [0.0] * layers}  # not written by 0.1
        known |= {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in known.items()}
        return cls(**values)


@dataclass(frozen=True)
class Change:
    """That a layer does something else from now on."""

    layer: int
    before: str
    now: str
    why: str
    """The numbers compared."""


@dataclass(frozen=True)
class Decision:
    """What to do after a measurement: the new state, and which layers get the structure just found."""

    state: ScheduleState
    regroup: tuple[bool, ...]
    changes: tuple[Change, ...] = ()
