"""Switchable sparse-dense learning (SSD): one set of Transformer weights, two ways to multiply it.

from switchable import Controller, SwitchConfig, convert, set_mode

report = convert(model, SwitchConfig(num_experts=32, experts_per_token=6))     # "12 of 12 FFNs are switchable"
controller = Controller(model, probe, total_steps=10_000)
...                                                                             # your loop:
    controller.step(optimizer)                                                  # after optimizer.step()
"""

from switchable.errors import InputError
from switchable.ffn.convert import ConversionReport, convert, set_mode
from switchable.ffn.families import Family
from switchable.switching.config import SwitchConfig
from switchable.switching.controller import Controller

__version__ = "0.1.0"
__all__ = ["Controller", "ConversionReport", "Family", "InputError", "SwitchConfig", "convert", "set_mode"]
