"""What a switchable FFN is besides its weights: saved with its router, by whatever saves the model.

A state dict holds tensors, and torch lets a module add one of its own making (`get_extra_state`). Ours is JSON as
bytes: experts, K, part in sparse mode, family, which neuron is which. So `save_pretrained`, transformers' Trainer and
`torch.save(model.state_dict())` keep it, `load_state_dict` brings it back, and nothing of ours is in the config.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from switchable.errors import InputError
from switchable.ffn.router import Router
from switchable.ffn.ssd import SSD
from switchable.options import checked

FORMAT = 1
"""Of the description; a reader of lower ones refuses it."""


class SavedRouter(Router):
    """A router in whose state dict there is a description of its FFN too."""

    def __init__(self, ssd: SSD) -> None:
        super().__init__(ssd.d_model, ssd.num_experts, device=ssd.reads_FD.device)
        self.initialise(ssd.reads_FD)
        self.ssd = ssd

    def get_extra_state(self) -> Tensor:
        """Return the description, as bytes."""
        return encoded(describe(self.ssd))

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a description; one that cannot be, such as the average of two, is told and passed over."""
        try:
            take_over(self.ssd, decoded(state))
        except InputError as error:
            log = logging.getLogger(__name__)
            log.warning("%s keeps its own K and part in sparse mode: %s", self.ssd.name, error)


def describe(ssd: SSD) -> dict[str, Any]:
    """Return what an FFN is besides its weights, as plain values."""
    names = ("name", "num_experts", "experts_per_token", "takes_part", "why_dense")
    described = {"format": FORMAT, **{name: getattr(ssd, name) for name in names}}
    if ssd.mass < 1:
        described["mass"] = ssd.mass
    described |= {"family": dataclasses.asdict(ssd.settings.family), "neuron_ids": ssd.neuron_ids_F.tolist()}
    return described if ssd.holders[0].has_dense_mode else described | {"gate": "softmax"}


def take_over(ssd: SSD, described: Mapping[str, Any]) -> None:
    """Make an FFN what another one was. Without `neuron_ids` its neurons stand in their first order.

    Raises InputError, with nothing changed, if the description is of another FFN, or damaged.
    """
    try:
        k, takes_part, why = (described[n] for n in ("experts_per_token", "takes_part", "why_dense"))
        mass = checked("mass", described.get("mass", 1.0), float, above=0, most=1)
        ids_F = torch.tensor(described.get("neuron_ids", range(ssd.d_ff)), dtype=torch.int64, device="cpu")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the description of {ssd.name} is damaged ({error!r})") from None
    k = ssd.checked_experts_per_token(k)
    fits = described.get("num_experts", ssd.num_experts) == ssd.num_experts and isinstance(takes_part, bool)
    if not fits or not torch.equal(ids_F.sort().values, torch.arange(ssd.d_ff, device="cpu")):
        raise InputError(f"the description of {ssd.name} is that of another FFN, or damaged")
    ssd.experts_per_token, ssd.mass, ssd.takes_part = k, mass, takes_part
    ssd.why_dense, ssd.neuron_ids_F = str(why), ids_F


def encoded(described: Mapping[str, Any]) -> Tensor:
    """Return a description as bytes, uint8.

    There is room for any K and reason. So the length is always the same, as those who average state dicts expect.
    """
    room = 2048 + len(json.dumps(described.get("neuron_ids", ())))
    return torch.frombuffer(bytearray(json.dumps(described).ljust(room).encode()), dtype=torch.uint8)


def decoded(state: Tensor) -> dict[str, Any]:
    """Return a description that was `encoded`; raise InputError if it is damaged, or a later version wrote it."""
    try:
        described = dict(json.loads(bytes(state.to("cpu", torch.uint8).tolist())))
        name, written = str(described["name"]), int(described["format"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"their description is damaged ({error!r:.100})") from None
    if written > FORMAT:
        raise InputError(f"{name} is described in format {written}, of a later version; update switchable")
    return described
