"""What is to be known of an FFN before it is made switchable, and is fixed from then on.

Shapes: D d_model, F d_ff, E experts.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from switchable.errors import InputError, divisors_near
from switchable.ffn.families import Family, activation_name, neurons_first
from switchable.ffn.ssd import FFNSettings
from switchable.settings import SwitchConfig


def facts_of(ffn: nn.Module, family: Family, name: str) -> tuple[str, int, int]:
    """Return the activation's name in `ACT2FN`, D and F of an FFN whose projections are in `ffn`.

    Raises:
        InputError: the activation has no name in `ACT2FN`.
    """
    activation = family.activation_fn
    if family.activation is not None:
        act = ffn.get_submodule(family.activation)
        activation = activation_name(act)
    if activation is None:
        raise InputError(
            f"the activation of {name}, {type(act).__name__}, has parameters of its own or no name in transformers' "
            "ACT2FN; use e.g. nn.ReLU"
        )
    rows, d_model = neurons_first(cast(nn.Linear, ffn.get_submodule(family.up)), output=False).shape
    return activation, d_model, rows if family.fused is None else rows // 2


def settings_of(ffn: nn.Module, family: Family, name: str, config: SwitchConfig) -> FFNSettings:
    """Return the settings of a switchable FFN in the place of another; `config` has a value for every setting.

    Raises:
        InputError: E does not divide F, or the activation has no name in `ACT2FN`.
    """
    activation, d_model, d_ff = facts_of(ffn, family, name)
    if d_ff % config.num_experts:
        allowed = ", ".join(str(d) for d in divisors_near(d_ff, config.num_experts))
        raise InputError(
            f"num_experts={config.num_experts} does not divide d_ff={d_ff} of {name}; use one of {allowed}"
        )
    return FFNSettings(family, name, activation, d_model, d_ff, config)
