"""Settings of version 0.1 that are gone: what replaces each, and how a run stored by 0.1 is read.

What lost in experiments was deleted with its setting. A stored run can still be opened and resumed if such a setting
had the value by which it did nothing, or did what is now the only way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from switchable.errors import InputError


class Gone(NamedTuple):
    """A setting that is gone."""

    instead: str  # what to do instead, as the end of a sentence
    neutral: tuple[Any, ...] | None = None
    """Stored values that ask for nothing that is gone; None: all of them."""
    needs: str | None = None  # a setting of its section without which (0 or none) no value asks for anything


GONE: dict[str, Gone] = {
    "structure": Gone(
        "neurons are grouped by weights; `switchable convert` groups by co-activation", ("weights",)
    ),
    "router": Gone("routers learn; the paper's: `switchable compare --methods ssd-paper`", ("learned",)),
    "router_objective": Gone("routers learn the activation mass", ("mass",)),
    "router_gate_gradient": Gone("routers learn the activation mass alone", (False,)),
    "router_noise": Gone("it did not help", (0,)),
    "router_sparse_fraction": Gone("it is always 1/16, in early sparse steps 1/8", (0.0625,)),
    "commitment": Gone("it did not help", (0,)),
    "gate": Gone("experts are unscaled; a mixture of experts: `switchable compare --methods moe`", ("unit",)),
    "load_balance": Gone("it belongs to `switchable compare --methods moe`", (0,)),
    "join": Gone("each layer joins by itself", ("each",)),
    "regroup": Gone("a structure in use stands", ("drift",)),
    "regroup_below": Gone("a structure in use stands", (0,)),
    "dense_steps": Gone("each return is one dense step", (1,)),
    "activation_target": Gone("it is always 0.12", (0.12,), needs="activation_l1"),
    "max_expert_fraction": Gone("it is always 0.65, in early sparse steps 1/3", (0.65,), needs="mass_target"),
    "schedule": Gone(
        "use recipe dense to train all dense; static and sparse are methods of `switchable compare`",
        ("ssd", "dense"),
    ),
    "expert_compute": Gone("use backend"),
    "objective": Gone("it follows from the family"),
}
"""By name. `probe_tokens` has moved to the section `train`."""

BACKENDS = {"eager": "reference", "torch_grouped_mm": "grouped_mm", "triton_atomic": "triton"}
BACKENDS |= {"sorted": "auto"}
"""New names of backends, and what takes the place of one that is gone."""


def refuse_gone(name: str, where: str) -> None:
    """Raise InputError if a setting that is given is gone."""
    if name in GONE:
        raise InputError(f"{where}: {name} is gone; {GONE[name].instead}")


def upgraded(stored: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """Return a stored `config.yaml`'s sections as this version writes them; InputError if one asks for what is gone."""
    sections = {name: dict(values) for name, values in stored.items()}
    switch, train = sections.setdefault("switch", {}), sections.setdefault("train", {})
    if "probe_tokens" in switch:
        train["probe_tokens"] = switch.pop("probe_tokens")
    for values in sections.values():
        for name in [name for name in values if name in GONE]:
            instead, neutral, needs = GONE[name]
            asks = neutral is not None and values[name] not in neutral
            if asks and (needs is None or values.get(needs)):
                raise InputError(
                    f"{where}: {name}={values[name]!r} is gone ({instead}); open this run with switchable 0.1"
                )
    if switch.get("schedule") == "dense":
        switch |= {"recipe": "dense", "min_dense_fraction": 1.0}
    if backend := switch.get("expert_compute", switch.get("backend")):
        switch["backend"] = BACKENDS.get(backend, backend)
    return {
        section: {name: value for name, value in values.items() if name not in GONE}
        for section, values in sections.items()
    }
