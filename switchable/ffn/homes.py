"""Which module an FFN found by its structure is, or stands in, and what its parts are called there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from switchable.compute.activations import activation_name
from switchable.errors import InputError
from switchable.ffn.families import Family, halves
from switchable.ffn.layer import SwitchableFFN
from switchable.ffn.matching import Match
from switchable.ffn.recording import Call, close
from switchable.ffn.ssd import RESERVED

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class _Search:
    """An FFN whose home is looked for, and what is known of it."""

    model: nn.Module
    match: Match
    seen: Sequence[Call]
    trained: Sequence[Call]
    probability: float
    """Of the dropout before the output projection; 0 without one."""


def family_at(
    model: nn.Module, match: Match, seen: Sequence[Call], trained: Sequence[Call]
) -> tuple[str, Family]:
    """Return the path of the module that holds an FFN's projections, and the family (its `ffn` is still to be named).

    `seen` are calls in evaluation, `trained` calls in training, in which each dropout has a probability of its own.
    Raises InputError if a dropout cannot be found, or is used elsewhere too.
    """
    paths = [call.name for call in match.calls]
    search = _Search(model, match, seen, trained, _probability(match, trained))
    for home in _above(paths):
        if (family := _as_module(search, home)) is not None:
            return home, family
        if not isinstance(model.get_submodule(home), CONTAINERS):
            break
    for home in _above(paths):
        if isinstance(model.get_submodule(home), CONTAINERS):
            continue
        if (family := _in_layer(search, home)) is not None:
            return home, family
    raise InputError(
        f"before {match.down.name} a dropout of {search.probability:.2g} is applied whose nn.Dropout or attribute is "
        "not to be found, or is used elsewhere too; FFNs cannot take it over"
    )


def _above(paths: Sequence[str]) -> Iterator[str]:
    """The paths of what holds all of some modules, innermost first."""
    levels = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
    for length in range(len(common), -1, -1):
        yield ".".join(common[:length])


def _of(calls: Sequence[Call], name: str) -> list[Call]:
    return [call for call in calls if call.name == name]


def _probability(match: Match, trained: Sequence[Call]) -> float:
    """Return the probability of the dropout before the output projection, 0 without one."""
    x = _of(trained, match.down.name)[0].x
    up = None if match.up is None else _of(trained, match.up.name)[0].y
    expected = match.hidden(_of(trained, match.gate.name)[0].y, up)
    if close(expected, x):
        return 0.0
    kept = x != 0
    large = kept & (expected.abs() > 0.1 * expected.abs().max())
    scale = float((x[large].double() / expected[large].double()).median()) if large.any() else 0.0
    if scale <= 1 or not close(torch.where(kept, expected * scale, 0.0), x):
        raise InputError(
            f"in training, {match.down.name} is given something else than in evaluation, and no dropout explains it"
        )
    return 1 - 1 / scale


def _as_module(search: _Search, home: str) -> Family | None:
    """Return the family if a module is the FFN and nothing else."""
    match, trained, module = search.match, search.trained, search.model.get_submodule(home)
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    taken = any(name in RESERVED or hasattr(SwitchableFFN, name) for name, _ in module.named_children())
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    own_calls, its_calls, ends = _of(search.seen, home), _of(search.seen, match.down.name), _of(trained, home)
    if not home or own or taken or hooks or len(own_calls) != len(its_calls) or not ends:
        return None
    if not all(
        c.alone and close(c.x, g.x) and close(c.y, d.y)
        for c, g, d in zip(own_calls, _of(search.seen, match.gate.name), its_calls, strict=True)
    ):
        return None
    behind = None
    end, inside = ends[0].y, _of(trained, match.down.name)[0].y
    if not close(end, inside):
        dropouts = (c for c in trained if isinstance(c.module, nn.Dropout) and c.name.startswith(f"{home}."))
        behind = next((c.name for c in dropouts if close(c.x, inside) and close(c.y, end)), None)
        if behind is None:
            return None
    hidden = _dropout_module(search, home) if search.probability else None
    if search.probability and hidden is None:
        return None
    return _family(search, home, hidden, dropout=None if behind is None else behind[len(home) + 1 :])


def _in_layer(search: _Search, home: str) -> Family | None:
    """Return the family if a layer does other things too; None if the dropout is not the FFN's alone."""
    match, named = search.match, vars(search.model.get_submodule(home))
    for call in match.calls:
        if not isinstance(call.module, nn.Linear):
            raise InputError(f"{call.name} is a {type(call.module).__name__} in a layer; use nn.Linear there")
    hidden = None
    if search.probability:
        hidden = next((n for n, v in named.items() if "drop" in n and _is_it(v, search.probability)), None)
        hidden = hidden or _dropout_module(search, home)
        if hidden is None:
            return None
        calls = _of(search.trained, f"{home}.{hidden}" if home else hidden)
        if hidden not in named and len(calls) != len(_of(search.trained, match.down.name)):
            return None
    return _family(search, home, hidden, in_layer=True)


def _is_it(value: object, probability: float) -> bool:
    return isinstance(value, float) and abs(value - probability) < 0.015


def _dropout_module(search: _Search, home: str) -> str | None:
    """Return the path, from a module, of the dropout with the probability in it."""
    modules = search.model.get_submodule(home).named_modules()
    fits = (n for n, m in modules if isinstance(m, nn.Dropout) and _is_it(m.p, search.probability))
    return next(fits, None)


def _family(
    search: _Search, home: str, hidden: str | None, in_layer: bool = False, dropout: str | None = None
) -> Family:
    start, match = len(home) + 1 if home else 0, search.match
    gate = match.gate.name[start:]
    up = match.up.name[start:] if match.up is not None else gate
    gated = match.up is not None or match.fused is not None
    activation = None if in_layer and match.fused else _activation_module(search, home)
    return Family(
        "",
        up,
        match.down.name[start:],
        activation=None if activation is None else activation[start:],
        activation_fn=match.activation if activation is None else None,
        gate=gate if gated else None,
        fused=match.fused,
        hidden_dropout=hidden,
        dropout=dropout,
        in_layer=in_layer,
        layers="",
    )


def _activation_module(search: _Search, home: str) -> str | None:
    """Return the path of the activation, None where it is a function."""
    seen, match = search.seen, search.match
    count = len(_of(seen, match.down.name))
    gate = match.gate.y if match.fused is None else halves(match.gate.y, match.fused, -1)[0]
    own = (c for c in seen if (not home or c.name.startswith(f"{home}.")) and not list(c.module.children()))
    for call in own:
        reads_gate = activation_name(call.module) == match.activation and close(call.x, gate)
        if reads_gate and len(_of(seen, call.name)) == count:
            return call.name
    return None
