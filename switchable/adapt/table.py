"""What a conversion found, in figures and as text: a row per FFN, and the loss in every mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from switchable.ffn.convert import kept_modes, layers_of, set_mode
from switchable.infer.loss import loss_in_mode, validation_loss
from switchable.switching.measures import Batch, LayerSums, show

FRACTIONS = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5}
"""K/E at which the loss is measured."""


@dataclass(frozen=True)
class LayerRow:
    """One FFN on the validation text; shares, 0 to 1."""

    name: str
    experts_per_token: int
    """K of the FFN."""
    activation_ratio: float
    """Share of (token, neuron) pairs whose activation is not zero."""
    mass_caught: float
    """Share of the activation mass in the router's K experts."""
    mass_best: float
    """Share of the activation mass in each token's best K experts."""
    takes_part: bool
    """Whether the FFN is sparse in sparse mode."""


@dataclass(frozen=True)
class Losses:
    """Losses on the validation text, nats per predicted token."""

    dense: float
    sparse: dict[str, float]
    """By K/E; FFNs that do not take part are dense."""


def layer_rows(model: nn.Module, probe: Iterable[Batch]) -> list[LayerRow]:
    """Measure every FFN at its own K on model inputs without labels."""
    layers = layers_of(model)
    every = [LayerSums(layer) for layer in layers]
    show(model, probe, [sums.add for sums in every])
    return [
        LayerRow(
            ssd.name, sums.chosen, sums.activation_ratio, sums.mass_caught, sums.mass_best_k, ssd.takes_part
        )
        for ssd, sums in zip((layer.ssd for layer in layers), every, strict=True)
    ]


def losses(model: nn.Module, validation: Sequence[Batch], progress: bool = False) -> Losses:
    """Measure the loss in dense mode and at each K/E."""
    sparse = {}
    with kept_modes(model) as layers:
        for name, fraction in FRACTIONS.items():
            set_mode(model, "sparse", [max(1, round(fraction * layer.ssd.num_experts)) for layer in layers])
            sparse[name] = validation_loss(model, validation, progress)
    return Losses(loss_in_mode(model, validation, "dense", progress), sparse)


def as_text(rows: Sequence[LayerRow], found: Losses, num_experts: int) -> str:
    """Return the table."""
    width = max(len("FFN"), *(len(row.name) for row in rows))
    lines = [f"{'FFN':<{width}}  active  K of {num_experts:<4}  caught  best choice  sparse mode"]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {row.activation_ratio:6.3f}  {row.experts_per_token:9}  {row.mass_caught:6.3f}  "
            f"{row.mass_best:11.3f}  {'sparse' if row.takes_part else 'stays dense'}"
        )
    lines.append(f"loss, nats per token: dense {found.dense:.4f}; {sparse_losses(found)}")
    return "\n".join(lines)


def sparse_losses(found: Losses) -> str:
    """Say the losses of sparse mode and how much higher they are than the dense one."""
    more = {name: 100 * (loss / found.dense - 1) for name, loss in found.sparse.items()}
    return ", ".join(f"K/E = {name} {found.sparse[name]:.4f} ({more[name]:+.1f} %)" for name in more)
