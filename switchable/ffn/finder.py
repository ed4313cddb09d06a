"""Find the FFNs of a model by what it does: projections D -> F and F -> D with an activation between them.

    down.x = act(up.y)      or      act(gate.y) * up.y            for numbers seen in a pass of the model itself

Candidates are found by their shapes, in evaluation. Then the projections of those that hold are made to return
prescribed numbers, wide enough to tell one activation from another, and its slope is compared too. A pass of training,
in which every dropout has another probability, shows which of them drops out here. What comes of it is a `Family`, as a
user would have written it.

Shapes: D d_model, F d_ff.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, groupby

import torch
from torch import Tensor, nn

from switchable.compute.activations import names
from switchable.errors import InputError
from switchable.ffn.families import HOW_TO_DESCRIBE, PROJECTIONS, Family, candidates, d_in, refuse_adapter
from switchable.ffn.homes import family_at
from switchable.ffn.matching import NEAR, Match, activations, consistent
from switchable.ffn.recording import Call, Modules, close, distance, recorded, tolerance
from switchable.ffn.trial import Trial

WIDE = 12.0
"""Range in which activations are compared."""


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules within a model by their names: what a trial has to watch for the search."""
    return [(name, module) for name, module in model.named_modules() if name]


def find_families(model: nn.Module, trial: Trial) -> tuple[list[Family], dict[str, str]]:
    """Return what the FFNs of a model are, more than one if they differ; and why other parts like them are not.

    Raises:
        InputError: there are none, or one that looks like the others is not one; says why.
    """
    modules, seen = named(model), trial.seen
    matches, others = consistent(seen)
    _refuse_adapters(seen, (call for match in matches.values() for call in match.calls))
    if not matches:
        raise InputError(f"no FFN found: {_why_not(seen)}. {candidates(model)}; {HOW_TO_DESCRIBE}")
    _check_whole(model, matches, seen)
    matches = _confirmed(trial, modules, matches)
    with trial.undisturbed():
        _tell_dropouts_apart(model)
        with torch.no_grad(), recorded(modules) as trained:
            trial.run(training=True)
        found = {name: family_at(model, match, seen, trained) for name, match in matches.items()}
    others = _unknown(model, seen, matches) | others
    return _gathered(model, found), {_place(name): why for name, why in others.items()}


def _refuse_adapters(seen: Sequence[Call], projections: Iterable[Call]) -> None:
    modules = {call.name: call.module for call in seen}
    for call in projections:
        around = call.name.rpartition(".")[0]
        refuse_adapter(around, modules.get(around))


def refuse_others(model: nn.Module) -> None:
    """Raise InputError for mixtures of experts and quantised weights."""
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters())
        if own and ("experts" in name.split(".") or "Experts" in type(module).__name__):
            raise InputError(
                f"{name} ({type(module).__name__}) is a mixture of experts already; FFNs that have no experts yet can "
                f"be switchable. {HOW_TO_DESCRIBE}"
            )
        weight = getattr(module, "weight", None)
        quantised = (
            isinstance(weight, Tensor) and isinstance(module, nn.Linear) and not weight.is_floating_point()
        )
        if quantised or hasattr(module, "qweight"):
            raise InputError(f"{name} ({type(module).__name__}) is quantised; load the model unquantised")


def _check_whole(model: nn.Module, matches: Mapping[str, Match], seen: Sequence[Call]) -> None:
    """Refuse if one output projection stands where the FFNs have theirs, in another layer, and is none of them."""
    places = {_place(name): name for name in matches}
    for name, module in model.named_modules():
        if isinstance(module, PROJECTIONS) and _place(name) in places and name not in matches:
            called = any(call.name == name for call in seen)
            why = _why_not(seen, name) if called else "no batch reaches it; give one, example_inputs={...}"
            raise InputError(f"{name} does not belong to an FFN as {places[_place(name)]} does: {why}")


def _unknown(model: nn.Module, seen: Sequence[Call], matches: Mapping[str, Match]) -> dict[str, str]:
    """Return what else has an FFN's shapes: with an activation that is not known, or never called."""
    found = {}
    for i, down in enumerate(seen):
        narrows = down.x.shape[-1] > down.y.shape[-1]
        if isinstance(down.module, PROJECTIONS) and down.name not in matches and narrows:
            for act in _between(seen[max(0, i - 4) : i], down):
                found[down.name] = f"its activation, {act.name} ({type(act.module).__name__}), is not known"
    called = {call.name for call in seen}
    idle = [(n, m) for n, m in model.named_modules() if isinstance(m, PROJECTIONS) and n not in called]
    for _, group in groupby(idle, lambda each: each[0].rpartition(".")[0]):
        *others, (last, module) = group
        d_ff, d_model = _widths(module)
        ups = {_widths(other) for _, other in others}
        if ups and d_ff > d_model and ups <= {(d_model, d_ff), (d_model, 2 * d_ff)}:
            found.setdefault(last, "no batch reaches it; give one, example_inputs={...}")
    return found


def _widths(projection: nn.Module) -> tuple[int, int]:
    """The widths of what a projection reads and writes."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return d_in(projection), weight.numel() // d_in(projection)


def _between(near: Sequence[Call], down: Call) -> Iterator[Call]:
    """Yield the module that is given what a projection returned, and returns what another is given."""
    for up, act in combinations(near, 2):
        inner = isinstance(up.module, PROJECTIONS) and not isinstance(act.module, PROJECTIONS)
        if inner and close(act.x, up.y) and close(act.y, down.x):
            yield act


def _place(name: str) -> str:
    above, _, last = name.rpartition(".")
    return re.sub(r"\d+", "*", above) + "." + last


def _why_not(seen: Sequence[Call], name: str | None = None) -> str:
    """Say what stands between two projections that have the shapes of an FFN's."""
    for i, down in enumerate(seen):
        d_ff, d_model = down.x.shape[-1], down.y.shape[-1]
        meant = d_ff > d_model if name is None else down.name == name
        if not meant or not isinstance(down.module, PROJECTIONS):
            continue
        for k in range(i - 1, max(-1, i - 4 * NEAR), -1):
            up = seen[k]
            fits = isinstance(up.module, PROJECTIONS) and d_in(up.module) == d_model
            if fits and up.y.shape[-1] in (d_ff, 2 * d_ff):
                _refuse_adapters(seen, (up, down))
                between = [
                    f"{c.name} ({type(c.module).__name__})"
                    for c in seen[k + 1 : i]
                    if any(True for _ in c.module.parameters()) and not isinstance(c.module, PROJECTIONS)
                ]
                what = f"{', '.join(between)} has parameters" if between else "no activation of ACT2FN fits"
                return f"between {up.name} and {down.name}, {what}"
    return "no projections D -> F and F -> D follow one another"


@torch.enable_grad()
def _confirmed(trial: Trial, modules: Modules, matches: Mapping[str, Match]) -> dict[str, Match]:
    """Return the matches with their activation's name, from what it makes of prescribed numbers."""
    generator = torch.Generator().manual_seed(0)
    instead: dict[str, Tensor] = {}
    for match in matches.values():
        for call in match.calls[1:]:  # but the output projection's
            numbers = torch.rand(call.y.shape[-1], generator=generator) * 2 - 1
            wide = call is match.gate
            instead[call.name] = (numbers * (WIDE if wide else 2.0)).to(call.y).requires_grad_(wide)
    downs = [(name, module) for name, module in modules if name in matches or name in instead]
    found = {}
    with trial.undisturbed(), recorded(downs, instead) as calls:
        trial.run(training=False)
    hidden = {call.name: call.x.flatten(0, -2)[0] for call in calls if call.name in matches}
    for name, match in matches.items():
        gate = instead[match.gate.name]
        up = None if match.up is None else instead[match.up.name]
        found[name] = replace(match, activation=_activation(name, match, hidden[name], gate, up))
    return found


def _activation(name: str, match: Match, h: Tensor, gate: Tensor, up: Tensor | None) -> str:
    """Return the activation that gives these numbers with these slopes."""
    off: dict[str, float] = {}
    slope = None
    if h.requires_grad:
        (slope,) = torch.autograd.grad(h.sum(), gate, retain_graph=True, allow_unused=True)
    if slope is None:
        slope = torch.zeros_like(gate)
    for activation in activations():
        ours = match.hidden(gate, up, activation)
        (its,) = torch.autograd.grad(ours.sum(), gate)
        off[activation] = max(distance(ours, h), distance(its, slope))
    best = min(off, key=lambda each: off[each])
    if off[best] > tolerance(h):
        value = min(activations(), key=lambda each: distance(match.hidden(gate, up, each), h))
        same = distance(match.hidden(gate, up, value), h) <= tolerance(h)
        raise InputError(
            f"the activation between {match.gate.name} and {name} "
            + (f"is {value} with another gradient" if same else "is none of transformers' ACT2FN")
        )
    return best


def _tell_dropouts_apart(model: nn.Module) -> None:
    """Give every dropout a probability of its own among its neighbours."""
    k = 0
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.Dropout) else [n for n in vars(module) if "drop" in n]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float | int) and not isinstance(value, bool) and "layerdrop" not in name:
                setattr(module, name, 0.1 + 0.04 * (k % 16))
                k += 1


def _gathered(model: nn.Module, found: Mapping[str, tuple[str, Family]]) -> list[Family]:
    """Return families without repetition: named by class where all of that class are FFNs, by path otherwise."""
    homes = dict(found.values())
    groups: dict[Family, list[str]] = defaultdict(list)
    for path, family in homes.items():
        groups[family].append(path)
    families = []
    for family, paths in groups.items():
        classes = {type(model.get_submodule(path)) for path in paths}
        alike = {name for name, module in model.named_modules() if type(module) in classes}
        own = not any(kind.__module__.startswith("torch.") for kind in classes)
        names = sorted(kind.__name__ for kind in classes) if own and alike == set(paths) else paths
        ffn = names[0] if len(names) == 1 else tuple(names)
        families.append(replace(family, ffn=ffn, activation_setting=_setting(model)))
    return families


def _setting(model: nn.Module) -> str:
    """Return the attribute of a model's config that names the activation, as far as can be told."""
    config = getattr(getattr(model, "config", None), "__dict__", {})
    texts = {name: value for name, value in config.items() if isinstance(value, str)}
    for name, value in texts.items():
        if value.removeprefix("gated-") in names() and ("act" in name or "feed_forward" in name):
            return str(name)
    return Family.activation_setting
