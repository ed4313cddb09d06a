"""Which projections of a pass belong together as an FFN, by the numbers that went through them.

Shapes: D d_model, F d_ff.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from switchable.compute.activations import activation_named, names
from switchable.ffn.families import FUSED, PROJECTIONS, d_in, halves
from switchable.ffn.recording import Call, close

NEAR = 12
"""Projections called before the output projection among which the others are looked for."""
activation_once = cache(activation_named)
"""Building one takes longer than calling it on a few numbers."""


def activations() -> list[str]:
    """Return the names of activations without parameters, the likeliest first."""
    return [name for name in names() if name not in ("linear", "prelu", "xielu")]


@dataclass(frozen=True)
class Match:
    """Projections that are an FFN's in one call of each."""

    down: Call
    gate: Call
    """The projection under the activation."""
    up: Call | None
    """What the activation is multiplied with; None without a gate or where both are one."""
    fused: str | None
    activation: str

    @property
    def calls(self) -> tuple[Call, ...]:
        """Those of all its projections, the output projection's first."""
        return tuple(call for call in (self.down, self.gate, self.up) if call is not None)

    def hidden(self, gate: Tensor, up: Tensor | None, activation: str | None = None) -> Tensor:
        """Return what the output projection should be given for what the others return."""
        act = activation_once(activation or self.activation)
        if self.fused is not None:
            gate, up = halves(gate, self.fused, -1)
        after: Tensor = act(gate)
        return after if up is None else after * up


def consistent(seen: Sequence[Call]) -> tuple[dict[str, Match], dict[str, str]]:
    """Return one match for each output projection whose every call is one with the same others; why not the rest."""
    calls = [c for c in seen if isinstance(c.module, PROJECTIONS)]
    counts = Counter(call.name for call in calls)
    found: dict[str, list[Match]] = defaultdict(list)
    for i, down in enumerate(calls):
        if (match := next(_matches(down, calls[max(0, i - NEAR) : i][::-1]), None)) is not None:
            found[down.name].append(match)
    alike, others = {}, {}
    for name, each in found.items():
        parts = {(*(call.name for call in match.calls), match.fused) for match in each}
        used = {counts[call.name] for call in each[0].calls}
        if len(parts) == 1 and used == {len(each)}:
            alike[name] = each[0]
        elif counts[name] == len(each):
            others[name] = (
                "it is not called with the same input projection each time, or that is called elsewhere too"
            )
    return _ffns_among(alike, others)


def _matches(down: Call, earlier: Sequence[Call]) -> Iterator[Match]:
    """Yield what could be an FFN with this output projection, nearest first."""
    (d_ff, d_model), tokens = _sizes(down), down.x.shape[:-1].numel()
    near = [c for c in earlier if d_in(c.module) == d_model and c.name != down.name]
    near = [c for c in near if c.y.shape[:-1].numel() == tokens]
    single = [c for c in near if c.y.shape[-1] == d_ff]
    options: list[tuple[Call, Call | None, str | None]] = [(c, None, None) for c in single]
    options += [(g, u, None) for g in single for u in single if g is not u and close(g.x, u.x)]
    options += [(c, None, fused) for c in near if c.y.shape[-1] == 2 * d_ff for fused in FUSED]
    for gate, up, fused in options:
        for activation in activations():
            match = Match(down, gate, up, fused, activation)
            few = match.hidden(_one(gate.y), None if up is None else _one(up.y))
            if close(few, _one(down.x)) and close(match.hidden(gate.y, None if up is None else up.y), down.x):
                yield match


def _one(numbers: Tensor) -> Tensor:
    """Those of the first token: most options are ruled out by them."""
    return numbers.flatten(0, -2)[0] if numbers.ndim > 1 else numbers


def _ffns_among(found: dict[str, Match], others: dict[str, str]) -> tuple[dict[str, Match], dict[str, str]]:
    """Leave out what is no layer's (a head) and what is narrower than the model (an adapter), if others are not."""
    layers = {_sizes(m.down) for n, m in found.items() if any(part.isdigit() for part in n.split(".")[:-1])}
    for belongs, why in (
        (lambda f, d: (f, d) in layers, "it is in no layer and has sizes of its own"),
        (lambda f, d: f >= d, "it is narrower than the model, as an adapter is"),
    ):
        chosen = {name: m for name, m in found.items() if belongs(*_sizes(m.down))} or found
        others |= dict.fromkeys(found.keys() - chosen.keys(), why)
        found = chosen
    return found, others


def _sizes(down: Call) -> tuple[int, int]:
    """F and D."""
    return down.x.shape[-1], down.y.shape[-1]
