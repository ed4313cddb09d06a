"""Switchable sparse-dense learning (SSD): one set of Transformer weights, two ways to multiply it.

    from switchable import Controller, SwitchConfig, convert, set_mode

    report = convert(model, SwitchConfig(num_experts=32, experts_per_token=6))     # "12 of 12 FFNs are switchable"
    controller = Controller(model, probe, total_steps=10_000)
    ...                                                                             # your loop:
        controller.step(optimizer)                                                  # after optimizer.step()

    model, tokenizer = switchable.load("runs/demo")      # a run, a checkpoint, an export, what save_pretrained wrote

Nothing happens at import: names are imported when first used, so that `switchable --help` answers without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from switchable.versions import __version__

if TYPE_CHECKING:
    from switchable.errors import InputError as InputError
    from switchable.ffn.convert import ConversionReport as ConversionReport
    from switchable.ffn.convert import convert as convert
    from switchable.ffn.convert import in_mode as in_mode
    from switchable.ffn.convert import set_mode as set_mode
    from switchable.ffn.families import Family as Family
    from switchable.settings import SwitchConfig as SwitchConfig
    from switchable.store.load import load as load
    from switchable.switching.controller import Controller as Controller

_HOMES = {
    "Controller": "switchable.switching.controller",
    "ConversionReport": "switchable.ffn.convert",
    "Family": "switchable.ffn.families",
    "InputError": "switchable.errors",
    "SwitchConfig": "switchable.settings",
    "convert": "switchable.ffn.convert",
    "in_mode": "switchable.ffn.convert",
    "load": "switchable.store.load",
    "set_mode": "switchable.ffn.convert",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'switchable' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
