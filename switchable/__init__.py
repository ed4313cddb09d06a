"""Switchable sparse-dense learning (SSD): one set of Transformer weights, two ways to multiply it.

    from switchable import Controller, SwitchConfig, convert, set_mode

    report = convert(model, SwitchConfig(num_experts=32, experts_per_token=6))     # "12 of 12 FFNs are switchable"
    controller = Controller(model, probe, total_steps=10_000)
    ...                                                                             # your loop:
        controller.step(optimizer)                                                  # after optimizer.step()

Names are imported when first used, so that `switchable --help` answers without loading torch. The one thing that
happens on import: transformers learns to open the folders that `switchable export --to sparse` writes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from switchable.store.announce import announce

if TYPE_CHECKING:
    from switchable.errors import InputError
    from switchable.ffn.convert import ConversionReport, convert, in_mode, set_mode
    from switchable.ffn.families import Family
    from switchable.settings import SwitchConfig
    from switchable.switching.controller import Controller

__version__ = "0.2.0"
__all__ = [
    "Controller",
    "ConversionReport",
    "Family",
    "InputError",
    "SwitchConfig",
    "convert",
    "in_mode",
    "set_mode",
]

_HOMES = {
    "ConversionReport": "switchable.ffn.convert",
    "Controller": "switchable.switching.controller",
    "Family": "switchable.ffn.families",
    "InputError": "switchable.errors",
    "SwitchConfig": "switchable.settings",
    "convert": "switchable.ffn.convert",
    "in_mode": "switchable.ffn.convert",
    "set_mode": "switchable.ffn.convert",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'switchable' has no attribute {name!r}")


announce()
