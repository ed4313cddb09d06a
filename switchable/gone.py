"""Settings of version 0.1 that are gone: what replaces each, and how a run stored by 0.1 is read.

What lost in experiments was deleted with its setting. A stored run can still be opened and resumed if such a setting
had the value by which it did nothing, or did what is now the only way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from switchable.errors import InputError

Sections = Mapping[str, Mapping[str, Any]]


class Gone(NamedTuple):
    """A setting that is gone."""

    instead: str
    """What to do instead, as the end of a sentence."""
    neutral: Callable[[Any, Mapping[str, Any]], bool]
    """Whether a stored value, beside the other settings of its section, asks for nothing that is gone."""


def _only(*values: object) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, _: value in values


GONE: dict[str, Gone] = {
    "structure": Gone(
        "neurons are grouped by weights; `switchable convert` groups by co-activation", _only("weights")
    ),
    "router": Gone(
        "routers learn; the paper's are in `switchable compare --methods ssd-paper`", _only("learned")
    ),
    "router_objective": Gone("routers learn the activation mass", _only("mass")),
    "router_gate_gradient": Gone("routers learn the activation mass alone", _only(False)),
    "router_noise": Gone("it did not help", _only(0)),
    "router_sparse_fraction": Gone("it is always 1/16", _only(0.0625)),
    "commitment": Gone("it did not help", _only(0)),
    "gate": Gone(
        "experts are not scaled; a mixture of experts is `switchable compare --methods moe`", _only("unit")
    ),
    "load_balance": Gone("it belongs to `switchable compare --methods moe`", _only(0)),
    "join": Gone("each layer joins by itself", _only("each")),
    "regroup": Gone("a structure in use stands", _only("drift")),
    "regroup_below": Gone("a structure in use stands", _only(0)),
    "dense_steps": Gone("each return is one dense step", _only(1)),
    "activation_target": Gone(
        "it is always 0.12", lambda value, others: value == 0.12 or not others.get("activation_l1")
    ),
    "max_expert_fraction": Gone(
        "it is always 0.65", lambda value, others: value == 0.65 or others.get("mass_target") is None
    ),
    "schedule": Gone(
        "use recipe dense to train all dense; static and sparse are methods of `switchable compare`",
        _only("ssd", "dense"),
    ),
    "expert_compute": Gone("use backend", lambda *_: True),
    "objective": Gone("it follows from the family", lambda *_: True),
}
"""By name. `probe_tokens` has moved to the section `train`."""

BACKENDS = {"eager": "reference", "torch_grouped_mm": "grouped_mm", "triton_atomic": "triton"}
"""New names of backends."""


def refuse_gone(name: str, where: str) -> None:
    """Raise InputError if a setting that is given is gone."""
    if name in GONE:
        raise InputError(f"{where}: {name} is gone; {GONE[name].instead}")


def upgraded(stored: Sections, where: str) -> dict[str, dict[str, Any]]:
    """Return a stored `config.yaml`'s sections as this version writes them; InputError if one asks for what is gone."""
    sections = {name: dict(values) for name, values in stored.items()}
    switch, train = sections.setdefault("switch", {}), sections.setdefault("train", {})
    if "probe_tokens" in switch:
        train["probe_tokens"] = switch.pop("probe_tokens")
    for values in sections.values():
        for name in [name for name in values if name in GONE]:
            if not GONE[name].neutral(values[name], values):
                raise InputError(
                    f"{where}: {name}={values[name]!r} is gone ({GONE[name].instead}); open this run with switchable "
                    "0.1"
                )
    if switch.get("schedule") == "dense":
        switch |= {"recipe": "dense", "min_dense_fraction": 1.0}
    if "expert_compute" in switch:
        switch["backend"] = BACKENDS.get(switch["expert_compute"], switch["expert_compute"])
    return {
        section: {name: value for name, value in values.items() if name not in GONE}
        for section, values in sections.items()
    }
